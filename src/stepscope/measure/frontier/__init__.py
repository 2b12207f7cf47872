"""Exploration against performance: which weights of a batch's sequences buy most reward for entropy."""
