"""Options of which pairs an optimizer step has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpofast.errors import ConfigError
from dpofast.options.run_fields import RunFields


# kw_only keeps the positional order of TrainingArguments and of DPOConfig's own options.
@dataclass(kw_only=True)
class StepFields(RunFields):
    """The field; docs/data.md says which steps it makes.

    Attributes:
        group_by_prompt: bring all pairs of a prompt into one optimizer step, which then has as many
            pairs as the batch sizes say, or some more.
    """

    group_by_prompt: bool = field(
        default=False, metadata={"help": "Bring all pairs of a prompt into one optimizer step."}
    )


def check_step_fields(config: Any, is_unpaired: bool) -> None:
    """Check the option; `is_unpaired` says whether the loss takes answers one by one.

    Raises:
        ConfigError: it isn't true or false, or there are no pairs.
    """
    if not isinstance(config.group_by_prompt, bool):
        raise ConfigError(
            f"group_by_prompt: got {config.group_by_prompt!r}, expected true or false."
        )
    if config.group_by_prompt and is_unpaired:
        raise ConfigError(
            f"group_by_prompt: the {config.loss_type[0]} loss takes answers one by one, so a step "
            "has no pairs to keep together; leave it out."
        )
