"""Answers judged in isolation: a helper process that answers cannot get out of."""
