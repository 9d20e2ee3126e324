"""Saves models and checkpoints, and finds out before training whether that is possible."""
