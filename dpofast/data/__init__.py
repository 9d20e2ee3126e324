"""Preference data: read it, tokenise it, plan the optimizer steps, lay out the micro-batches."""

from __future__ import annotations

from dpofast.data.reading.hold_out import check_eval_split, hold_out
from dpofast.data.reading.mixture import check_shares, mix_preferences, rows_by_source
from dpofast.data.reading.preferences import load_preferences
from dpofast.data.tokens.fingerprint import data_fingerprint
from dpofast.data.tokens.report import PreparationReport
from dpofast.data.tokens.tokenize import tokenize_preferences

__all__ = [
    "PreparationReport",
    "check_eval_split",
    "check_shares",
    "data_fingerprint",
    "hold_out",
    "load_preferences",
    "mix_preferences",
    "rows_by_source",
    "tokenize_preferences",
]
