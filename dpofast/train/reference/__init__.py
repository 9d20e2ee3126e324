"""The reference of a run: which model it is, and its log-probs from the store."""
