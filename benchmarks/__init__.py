"""Measurements of this project and its peers, and the data they run on."""
