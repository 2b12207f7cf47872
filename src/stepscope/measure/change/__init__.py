"""What the step does to a quantity: true, linear and second order, with errors."""
