"""Optimizer steps: their loaders, the length of their rows, their forward pass, clipping."""
