"""Reads preference data of any format and brings it to one normal form."""
