"""Column names that every part of dpofast agrees on."""

from __future__ import annotations

# The three parts of a pair. Columns of text or messages have exactly these names.
PAIR_COLUMNS = ("prompt", "chosen", "rejected")
# A tokenised pair: one list of token ids for each part.
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# Reference log-probs that a dataset can carry: float64, in nats. The names are TRL's.
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# How much a pair counts in the loss, and the probability that its chosen answer is the better one:
# float64. A pair without a weight counts once.
WEIGHT_COLUMNS = ("weight", "label_confidence")
# The dataset of a mixture that a pair comes from.
SOURCE_COLUMN = "source"
# No log-prob is above 0; one in float32 can be by as much as this, in nats, through rounding.
LOGP_ROUNDING = 0.01
