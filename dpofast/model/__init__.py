"""A transformers model during our steps: loaded, taken apart, checked, run."""
