"""Checkpoints: read without running anything in them, matched by name, examined."""
