"""Second order: what pairs of sequences do together, and the batch size and learning rate that follow."""
