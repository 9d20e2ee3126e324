"""Ends a run within a step at a NaN or an infinity, and keeps both out of its files."""
