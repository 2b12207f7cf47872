"""``stepscope study``: many measurements and what they say together."""
