"""Preference data: read it, tokenise it, plan the optimizer steps, lay out the micro-batches."""

from __future__ import annotations

from dpofast.data.reading.preferences import load_preferences
from dpofast.data.tokens.fingerprint import data_fingerprint
from dpofast.data.tokens.report import PreparationReport
from dpofast.data.tokens.tokenize import tokenize_preferences

__all__ = ["PreparationReport", "data_fingerprint", "load_preferences", "tokenize_preferences"]
