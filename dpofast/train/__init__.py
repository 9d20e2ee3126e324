"""The trainer and the parts that it wires together."""
