"""Which model made a stored log-prob."""
