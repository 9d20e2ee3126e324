"""Options that single losses have, and the loss that a run's options name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from dpofast.errors import ConfigError
from dpofast.options.run_fields import RunFields
from dpofast_kernels import LOSS_OPTIONS, PairLoss, make_loss


# kw_only keeps the positional order of TrainingArguments and of DPOConfig's own options.
@dataclass(kw_only=True)
class LossFields(RunFields):
    """The fields; docs/losses.md has the formulas.

    Attributes:
        discopop_tau: tau of the discopop loss, above 0 and at most 1.
        dpop_lambda: lambda of the dpop loss, at least 0.
    """

    discopop_tau: float = field(default=0.05, metadata={"help": "Tau of the discopop loss."})
    dpop_lambda: float = field(default=50.0, metadata={"help": "Lambda of the dpop loss."})


_DEFAULTS = {item.name: item.default for item in fields(LossFields)}


def unused_loss_options(config: Any) -> list[str]:
    """Looks for options that are given, but that belong to another loss than the run's.

    Returns:
        One remark for each.
    """
    return [
        f"{option}={getattr(config, option)!r} (only the loss {loss} has it)"
        for option, loss in LOSS_OPTIONS.items()
        if loss not in config.loss_type and getattr(config, option) != _DEFAULTS[option]
    ]


def named_loss(config: Any) -> PairLoss:
    """The pair loss that the options of a DPOConfig name.

    Raises:
        ConfigError: an unknown name, more than one, or an option out of range.
    """
    names = config.loss_type
    if not isinstance(names, (list, tuple)) or len(names) != 1:
        raise ConfigError(f"loss_type: got {names}, but one loss is trained at a time; name one.")
    own = {name: getattr(config, name) for name, loss in LOSS_OPTIONS.items() if loss == names[0]}
    try:
        return make_loss(names[0], config.beta, config.label_smoothing, **own)
    except (TypeError, ValueError) as error:
        named = "loss_type: " if str(error).startswith("Unknown loss") else ""
        raise ConfigError(f"{named}{error}") from error
