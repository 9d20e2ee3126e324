"""Pairs in the normal form, turned into token ids."""
