"""What a run was trained with: its arguments, read without running them, and the settings of a step."""
