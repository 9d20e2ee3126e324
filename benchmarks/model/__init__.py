"""Predicts how long the head and a training step take on a GPU, from arithmetic alone.

Nothing runs on a device. Every number that isn't counted is in assumptions.py, with its source.
"""
