"""The user's own loss and metrics, given as functions."""
