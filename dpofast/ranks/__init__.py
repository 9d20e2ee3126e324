"""Ranks of a run watch each other: none waits for ever for one that has failed or is lost."""
