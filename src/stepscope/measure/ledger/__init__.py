"""The ledger: what every token of every batch of a training did to a quantity, along the path taken."""
