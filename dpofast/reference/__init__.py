"""Reference log-probs: which model made them, how they are stored, and how they are built."""
