"""All that touches a model: checkpoints, the forward pass, rollouts, the objective, gradients."""
