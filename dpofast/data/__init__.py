"""Preference pairs: read, tokenised, cut, planned and laid out."""

from __future__ import annotations

from dpofast.data.fingerprint import data_fingerprint
from dpofast.data.load import load_preferences
from dpofast.data.report import PreparationReport
from dpofast.data.tokenize import tokenize_preferences

__all__ = ["PreparationReport", "data_fingerprint", "load_preferences", "tokenize_preferences"]
