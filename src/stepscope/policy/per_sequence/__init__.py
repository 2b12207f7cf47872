"""Gradients of single sequences by hooks on layers, and what is computed from them."""
