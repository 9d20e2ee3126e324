"""Preference data: read it, tokenise it, plan the optimizer steps, lay out the micro-batches."""

from __future__ import annotations

from dpofast.data.reading.hold_out import check_eval_split, hold_out
from dpofast.data.reading.mixture import (
    check_shares,
    check_weights,
    mix_preferences,
    rows_by_source,
)
from dpofast.data.reading.pair_stream import PairStream
from dpofast.data.reading.preferences import load_preferences
from dpofast.data.reading.row_stream import is_stream
from dpofast.data.tokens.fingerprint import data_fingerprint, pairs_fingerprint
from dpofast.data.tokens.report import PreparationReport
from dpofast.data.tokens.stream import TokenisedRows, TokenStream
from dpofast.data.tokens.tokenize import (
    refuse_nothing_kept,
    tokenize_preferences,
    warn_of_rerendered_prompts,
)

__all__ = [
    "PairStream",
    "PreparationReport",
    "TokenStream",
    "TokenisedRows",
    "check_eval_split",
    "check_shares",
    "check_weights",
    "data_fingerprint",
    "hold_out",
    "is_stream",
    "load_preferences",
    "mix_preferences",
    "pairs_fingerprint",
    "refuse_nothing_kept",
    "rows_by_source",
    "tokenize_preferences",
    "warn_of_rerendered_prompts",
]
