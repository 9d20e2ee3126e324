"""The training and held-out pairs of a run: prepared, or read from a stream window by window."""
