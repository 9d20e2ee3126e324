"""Options of which pairs the rows of a dataset make, and in which step these are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpofast.data.reading.answer_pairs import check_answer_pairs
from dpofast.errors import ConfigError
from dpofast.options.trl_fields import TRLFields


# kw_only keeps the positional order of TrainingArguments and of DPOConfig's own options.
@dataclass(kw_only=True)
class DataFields(TRLFields):
    """The fields; docs/data.md says which pairs and steps they make.

    Attributes:
        answer_pairs: which answers of a row with many answers make a pair: all with different
            scores, best_worst, adjacent scores, or given, those of the row's preferences. None is
            given for rows with preferences and all for others.
        group_by_prompt: bring all pairs of a prompt into one optimizer step, which then has as many
            pairs as the batch sizes say, or some more.
    """

    answer_pairs: str | None = field(
        default=None, metadata={"help": "Pairs of many answers: all, best_worst, adjacent, given."}
    )
    group_by_prompt: bool = field(
        default=False, metadata={"help": "Bring all pairs of a prompt into one optimizer step."}
    )


def check_data_fields(config: Any, is_unpaired: bool) -> None:
    """Check the options; `is_unpaired` says whether the loss takes answers one by one.

    Raises:
        ConfigError: one has no such value, or there are no pairs.
    """
    check_answer_pairs(config.answer_pairs)
    if config.answer_pairs is not None and is_unpaired:
        raise ConfigError(
            f"answer_pairs: the {config.loss_type[0]} loss takes answers one by one, so no pairs "
            "are made; leave it out."
        )
    if not isinstance(config.group_by_prompt, bool):
        raise ConfigError(
            f"group_by_prompt: got {config.group_by_prompt!r}, expected true or false."
        )
    if config.group_by_prompt and is_unpaired:
        raise ConfigError(
            f"group_by_prompt: the {config.loss_type[0]} loss takes answers one by one, so a step "
            "has no pairs to keep together; leave it out."
        )
