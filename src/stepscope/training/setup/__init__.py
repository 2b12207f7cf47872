"""What a training needs before its first step: model, prompts, settings of the Trainer, whole checkpoints."""
