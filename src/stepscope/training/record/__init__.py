"""StepRecorder: every optimizer step of any TRL training, with its batch, on disk."""
