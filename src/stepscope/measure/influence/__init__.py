"""Who did it: the change attributed to sequences and tokens, how sure that is, and its ground truth."""
