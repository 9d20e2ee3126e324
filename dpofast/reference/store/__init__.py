"""Reference log-probs on disk: bytes and keys, no models and no data."""
