"""Learning from preferences: pairs, and TRL's DPO trainer with samples of the policy beside them."""
