"""Checkpoint formats: one file for each way to lay a checkpoint out, and a registry of them."""
