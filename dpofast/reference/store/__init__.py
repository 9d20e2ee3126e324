"""Reference log-probs on disk. The store knows bytes and keys, neither models nor data."""
