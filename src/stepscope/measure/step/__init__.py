"""The optimizer's step: rebuilt with its components, its derivative, its rounding, its lifetime."""
