"""DeepSpeed: its configurations, the batch that it is told of, and weights that it spreads."""
