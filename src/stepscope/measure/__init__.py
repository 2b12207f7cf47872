"""The science: pure functions of a policy and rollouts; every number leaves as an Estimate."""
