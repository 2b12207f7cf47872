"""Optimizers: what each makes of a gradient, one file for each, and a registry of them."""
