"""A transformers causal LM as dpofast runs it: loading, checks, attention, body and head."""
