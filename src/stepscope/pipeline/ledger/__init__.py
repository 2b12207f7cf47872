"""``stepscope ledger``: the account of a recorded training."""
