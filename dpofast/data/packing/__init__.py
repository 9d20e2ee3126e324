"""Token ids, planned and laid out as micro-batches."""
