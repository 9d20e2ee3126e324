"""The identity of the model that made a stored log-prob."""
