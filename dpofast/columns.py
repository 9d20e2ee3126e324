"""The names of the columns that every part of dpofast agrees on."""

from __future__ import annotations

# A tokenised pair: lists of token ids.
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# Reference log-probs that a dataset brings along: float64, in nats, named as in TRL.
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
