"""Quantities of a policy: their values per token, estimators, baselines and importance weights."""
