"""Column names that every part of dpofast agrees on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

# The three parts of a pair. Columns of text or messages have exactly these names.
PAIR_COLUMNS = ("prompt", "chosen", "rejected")
# A tokenised pair: one list of token ids for each part.
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# Whether the answer of an unpaired row is desirable: a bool.
LABEL_COLUMN = "label"
# The token ids of an answer to another prompt, which KTO compares an unpaired row with.
MISMATCHED_COLUMN = "mismatched_ids"
# Which answers of a ranked row are compared: [chosen, rejected], places in its list of answers; how
# many pairs its equal scores leave unmade; and the place of each answer in the source's list.
PAIRS_COLUMN, TIES_COLUMN, PLACES_COLUMN = "pairs", "ties", "places"
# Reference log-probs that a dataset can carry: float64, in nats. The names are TRL's.
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# How much a pair counts in the loss, and the probability that its chosen answer is the better one:
# float64. A pair without a weight counts once.
WEIGHT_COLUMNS = ("weight", "label_confidence")
# The dataset of a mixture that a pair comes from.
SOURCE_COLUMN = "source"
# No log-prob is above 0; one in float32 can be by as much as this, in nats, through rounding.
LOGP_ROUNDING = 0.01


@dataclass(frozen=True, slots=True)
class RowKind:
    """What a row of data has besides its prompt.

    Attributes:
        name: "paired", "unpaired" or "ranked".
        noun: what messages call a row.
        answers: columns of the answers, as text or as messages.
        labelled: whether a column says if the answer is desirable.
        many: whether a column of answers holds a list of any number of them.
    """

    name: str
    noun: str
    answers: tuple[str, ...]
    labelled: bool = False
    many: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the prompt and the answers, as text or as messages."""
        return ("prompt", *self.answers)

    @property
    def id_columns(self) -> tuple[str, ...]:
        """Columns of the prompt and the answers, as token ids."""
        return tuple(f"{column}_ids" for column in self.columns)


PAIRED = RowKind("paired", "pair", PAIR_COLUMNS[1:])
# One answer and a label, as KTO takes them (arXiv:2402.01306).
UNPAIRED = RowKind("unpaired", "row", ("completion",), labelled=True)
# Any number of answers to one prompt, and the pairs of them that are compared.
RANKED = RowKind("ranked", "row", ("completions",), many=True)


def kind_of_columns(columns: Collection[str]) -> RowKind:
    """The kind of rows in the normal form or tokenised, from the names of their columns."""
    for kind in (RANKED, UNPAIRED):
        if not {*kind.answers, *kind.id_columns[1:]}.isdisjoint(columns):
            return kind
    return PAIRED
