"""The stages of ``stepscope measure``."""
