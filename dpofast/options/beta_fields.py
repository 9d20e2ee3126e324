"""Options by which beta moves while a run trains."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from dpofast.errors import ConfigError
from dpofast.options.metric_fields import MetricFields

CONSTANT = "constant"
BETA_SCHEDULES = (CONSTANT, "linear", "cosine")
# Without bounds of its own, target_kl moves beta at most by this factor up and down.
WIDEST = 10.0


# kw_only keeps the positional order of TrainingArguments and of DPOConfig's own options.
@dataclass(kw_only=True)
class BetaFields(MetricFields):
    """The fields; docs/losses.md says what they do.

    Attributes:
        beta_schedule: constant, or linear or cosine from beta to beta_end over the run's steps.
        beta_end: beta of the last step, above 0; linear and cosine need it.
        target_kl: the drift in nats per token (the metric `kl/absolute`) near which beta is moved
            after every step; above 0. None leaves beta where it is.
        target_kl_gain: share by which a step may move beta for target_kl, for each unit of the
            relative error, which is clipped to +-0.2; above 0 and at most 1.
        beta_min: smallest beta of target_kl; by default a tenth of beta.
        beta_max: largest beta of target_kl; by default ten times beta.
    """

    beta_schedule: str = field(
        default=CONSTANT, metadata={"help": f"How beta moves: {', '.join(BETA_SCHEDULES)}."}
    )
    beta_end: float | None = field(default=None, metadata={"help": "Beta of the last step."})
    target_kl: float | None = field(
        default=None, metadata={"help": "Move beta to keep the drift at these nats per token."}
    )
    target_kl_gain: float = field(
        default=0.1, metadata={"help": "How fast target_kl moves beta; at most 1."}
    )
    beta_min: float | None = field(
        default=None, metadata={"help": "Smallest beta of target_kl; a tenth of beta by default."}
    )
    beta_max: float | None = field(
        default=None, metadata={"help": "Largest beta of target_kl; 10 x beta by default."}
    )


_DEFAULTS = {item.name: item.default for item in fields(BetaFields)}
_OF_TARGET = ("target_kl_gain", "beta_min", "beta_max")


def check_beta_fields(config: Any) -> None:
    """Check the options, after beta itself.

    Raises:
        ConfigError: a value can't be used, or the options don't go together.
    """
    schedule = config.beta_schedule
    if schedule not in BETA_SCHEDULES:
        raise ConfigError(
            f"beta_schedule: got {schedule!r}, expected one of {', '.join(BETA_SCHEDULES)}."
        )
    for name in ("beta_end", "target_kl", *_OF_TARGET):
        if getattr(config, name) is not None:
            _check_positive(config, name)
    if config.target_kl_gain is None or config.target_kl_gain > 1.0:
        raise ConfigError(
            f"target_kl_gain: got {config.target_kl_gain!r}, expected a number above 0 and at most "
            "1."
        )
    if schedule != CONSTANT and config.beta_end is None:
        raise ConfigError(
            f"beta_schedule: {schedule} needs the beta of the last step; set beta_end."
        )
    if config.target_kl is None:
        return
    if schedule != CONSTANT:
        raise ConfigError(
            f"target_kl: beta_schedule is {schedule!r}, too, but only one of them can move beta; "
            "leave one out."
        )
    smallest, largest = beta_bounds(config)
    if not smallest <= config.beta <= largest:
        raise ConfigError(
            f"beta: got {config.beta!r}, which isn't between beta_min, {smallest:g}, and beta_max, "
            f"{largest:g}."
        )


def _check_positive(config: Any, name: str) -> None:
    value = getattr(config, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0.0:
        raise ConfigError(f"{name}: got {value!r}, expected a number above 0.")


def beta_bounds(config: Any) -> tuple[float, float]:
    """The smallest and the largest beta of target_kl."""
    smallest = config.beta / WIDEST if config.beta_min is None else config.beta_min
    largest = config.beta * WIDEST if config.beta_max is None else config.beta_max
    return smallest, largest


def unused_beta_options(config: Any) -> list[str]:
    """One remark for each option that is given, but that has no effect without another one."""
    remarks = []
    if config.beta_schedule == CONSTANT and config.beta_end is not None:
        remarks.append(f"beta_end={config.beta_end!r} (only linear and cosine have it)")
    if config.target_kl is None:
        remarks += [
            f"{name}={getattr(config, name)!r} (only target_kl has it)"
            for name in _OF_TARGET
            if getattr(config, name) != _DEFAULTS[name]
        ]
    return remarks


def beta_facts(config: Any) -> dict[str, Any]:
    """The options as far as they have an effect; None for those without."""
    moves, has_target = config.beta_schedule != CONSTANT, config.target_kl is not None
    smallest, largest = beta_bounds(config)
    return {
        "beta_schedule": config.beta_schedule if moves else None,
        "beta_end": config.beta_end if moves else None,
        "target_kl": config.target_kl,
        "target_kl_gain": config.target_kl_gain if has_target else None,
        "beta_min": smallest if has_target else None,
        "beta_max": largest if has_target else None,
    }


def beta_in_words(config: Any) -> str | None:
    """How beta moves; None if it doesn't."""
    if config.target_kl is not None:
        smallest, largest = beta_bounds(config)
        return (
            f"moved from {config.beta:g} to keep kl/absolute at target_kl {config.target_kl:g}, "
            f"with gain {config.target_kl_gain:g}, within {smallest:g} and {largest:g}"
        )
    if config.beta_schedule == CONSTANT:
        return None
    return f"{config.beta_schedule}, from {config.beta:g} to {config.beta_end:g} over the run"
