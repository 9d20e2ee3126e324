"""Preference data, in pairs or unpaired: read it, tokenise it, plan the steps, lay out the rows."""

from __future__ import annotations

from dpofast.data.reading.hold_out import check_eval_split, hold_out
from dpofast.data.reading.mixture import (
    check_shares,
    check_weights,
    mix_preferences,
    rows_by_source,
)
from dpofast.data.reading.pair_stream import PairStream
from dpofast.data.reading.preferences import (
    data_kind,
    load_preferences,
    load_unpaired,
)
from dpofast.data.reading.row_stream import is_stream
from dpofast.data.reading.split_pairs import split_pairs
from dpofast.data.tokens.fingerprint import data_fingerprint, pairs_fingerprint
from dpofast.data.tokens.mismatched import with_mismatched
from dpofast.data.tokens.pooled import PooledPairs
from dpofast.data.tokens.ranked import tokenize_ranked
from dpofast.data.tokens.refusals import refuse_nothing_kept, warn_of_rerendered_prompts
from dpofast.data.tokens.report import PreparationReport
from dpofast.data.tokens.stream import TokenisedRows, TokenStream
from dpofast.data.tokens.tokenize import tokenize_preferences
from dpofast.data.tokens.unpaired import refuse_one_label, tokenize_unpaired

__all__ = [
    "PairStream",
    "PooledPairs",
    "PreparationReport",
    "TokenStream",
    "TokenisedRows",
    "check_eval_split",
    "check_shares",
    "check_weights",
    "data_fingerprint",
    "data_kind",
    "hold_out",
    "is_stream",
    "load_preferences",
    "load_unpaired",
    "mix_preferences",
    "pairs_fingerprint",
    "refuse_nothing_kept",
    "refuse_one_label",
    "rows_by_source",
    "split_pairs",
    "tokenize_preferences",
    "tokenize_ranked",
    "tokenize_unpaired",
    "warn_of_rerendered_prompts",
    "with_mismatched",
]
