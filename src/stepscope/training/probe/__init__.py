"""StepProbe: the change of a quantity, predicted and realised, during any TRL training."""
