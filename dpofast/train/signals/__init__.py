"""Saves a checkpoint and ends the run when a signal asks for it."""
