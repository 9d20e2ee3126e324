"""Reference log-probs on disk: who made them, the rows themselves, and how they are made."""
