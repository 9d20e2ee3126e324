"""Options of what is made of the rows of a dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpofast.data.reading.answer_pairs import check_answer_pairs
from dpofast.errors import ConfigError
from dpofast.options.trl_fields import TRLFields


# kw_only keeps the positional order of TrainingArguments and of DPOConfig's own options.
@dataclass(kw_only=True)
class DataFields(TRLFields):
    """The field; docs/data.md says which pairs it makes.

    Attributes:
        answer_pairs: which answers of a row with many answers make a pair: all with different
            scores, best_worst, adjacent scores, or given, those of the row's preferences. None is
            given for rows with preferences and all for others.
    """

    answer_pairs: str | None = field(
        default=None, metadata={"help": "Pairs of many answers: all, best_worst, adjacent, given."}
    )


def check_data_fields(config: Any, is_unpaired: bool) -> None:
    """Check the option; `is_unpaired` says whether the loss takes answers one by one.

    Raises:
        ConfigError: it has no such value, or there are no pairs.
    """
    check_answer_pairs(config.answer_pairs)
    if config.answer_pairs is not None and is_unpaired:
        raise ConfigError(
            f"answer_pairs: the {config.loss_type[0]} loss takes answers one by one, so no pairs "
            "are made; leave it out."
        )
