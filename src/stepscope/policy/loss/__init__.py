"""The loss of a run: its settings and its gradient with respect to each token's log-prob."""
