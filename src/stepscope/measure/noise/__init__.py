"""The gradient noise scale, its limits, and what it says about the batch size."""
