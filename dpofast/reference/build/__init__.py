"""Scores the reference log-probs that the store is missing."""
