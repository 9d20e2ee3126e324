"""Options that decide the loss beside `loss_type`, and the loss that a run's options name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from dpofast.errors import ConfigError
from dpofast.options.run_fields import RunFields
from dpofast_kernels import (
    COUPLED_LOSSES,
    DIVERGENCES,
    LOSS_OPTIONS,
    DivergenceLoss,
    PreferenceLoss,
    make_coupled_loss,
    make_mixture,
)

REVERSE_KL = "reverse_kl"
# Defaults of this version and of older ones of TRL.
USUAL_COEFFICIENTS = (0.5, 1.0)


# kw_only keeps the positional order of TrainingArguments and of DPOConfig's own options.
@dataclass(kw_only=True)
class LossFields(RunFields):
    """The fields; docs/losses.md has the formulas.

    Attributes:
        loss_weights: a weight for each loss of loss_type, at least 0; None for 1 each.
        f_divergence_type: reverse_kl, forward_kl, js_divergence or alpha_divergence.
        f_alpha_divergence_coef: coefficient of alpha_divergence.
        discopop_tau: tau of the discopop loss, above 0 and at most 1.
        dpop_lambda: lambda of the dpop loss, at least 0.
    """

    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each loss of loss_type; 1 by default."}
    )
    f_divergence_type: str = field(
        default=REVERSE_KL,
        metadata={"help": f"What keeps the policy near the reference: {', '.join(DIVERGENCES)}."},
    )
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata={"help": "Coefficient of alpha_divergence."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Tau of the discopop loss."})
    dpop_lambda: float = field(default=50.0, metadata={"help": "Lambda of the dpop loss."})


_DEFAULTS = {item.name: item.default for item in fields(LossFields)}


def settle_loss_fields(config: Any) -> None:
    """Give the options their usual form: loss_type as a list, TRL's enum as its value."""
    names = config.loss_type
    if isinstance(names, str | tuple):
        config.loss_type = [names] if isinstance(names, str) else list(names)
    config.f_divergence_type = getattr(config.f_divergence_type, "value", config.f_divergence_type)


def unused_loss_options(config: Any) -> list[str]:
    """Looks for options that are given, but that the run's loss doesn't have.

    Returns:
        One remark for each.
    """
    remarks = [
        f"{option}={getattr(config, option)!r} (only the loss {loss} has it)"
        for option, loss in LOSS_OPTIONS.items()
        if loss not in config.loss_type and getattr(config, option) != _DEFAULTS[option]
    ]
    coefficient = config.f_alpha_divergence_coef
    is_alpha = config.f_divergence_type == "alpha_divergence"
    if not is_alpha and coefficient not in USUAL_COEFFICIENTS:
        remarks.append(f"f_alpha_divergence_coef={coefficient!r} (only alpha_divergence has it)")
    if is_alpha and coefficient == 1.0:
        # In older versions of TRL it was one minus this number, and 1.0 the default.
        remarks.append(
            "f_divergence_type='alpha_divergence' (with f_alpha_divergence_coef=1.0 it is "
            "reverse_kl; in older versions of TRL it was forward_kl)"
        )
    return remarks


def loss_facts(config: Any) -> dict[str, Any]:
    """The options of the loss as far as they have an effect; None for those without."""
    weights, divergence = config.loss_weights, config.f_divergence_type
    is_alpha = divergence == "alpha_divergence"
    return {
        "loss_weights": None if weights is None or set(weights) == {1.0} else list(weights),
        "f_divergence_type": divergence,
        "f_alpha_divergence_coef": config.f_alpha_divergence_coef if is_alpha else None,
        **{
            option: getattr(config, option) if loss in config.loss_type else None
            for option, loss in LOSS_OPTIONS.items()
        },
    }


def named_loss(config: Any) -> PreferenceLoss:
    """The loss that the options of a DPOConfig name.

    Raises:
        ConfigError: an unknown name, an option out of range, or options that don't go together.
    """
    names, weights = config.loss_type, config.loss_weights
    if not isinstance(names, (list, tuple)) or not names:
        raise ConfigError(f"loss_type: got {names!r}, expected a name or a list of names.")
    if weights is not None:
        _check_weights(weights, names)
    _check_coefficient(config.f_alpha_divergence_coef)
    options = [option for option, loss in LOSS_OPTIONS.items() if loss in names]
    own = {option: getattr(config, option) for option in options}
    try:
        # What is no name is left to them to refuse.
        couples = any(isinstance(name, str) and name in COUPLED_LOSSES for name in names)
        make = make_coupled_loss if couples else make_mixture
        loss = make(names, weights, config.beta, config.label_smoothing, **own)
    except (TypeError, ValueError) as error:
        named = "loss_type: " if str(error).startswith("Unknown loss") else ""
        raise ConfigError(f"{named}{error}") from error
    return loss if config.f_divergence_type == REVERSE_KL else _with_divergence(loss, config)


def _check_weights(weights: Any, names: Any) -> None:
    is_list = isinstance(weights, list | tuple)
    if not is_list or any(isinstance(w, bool) or not isinstance(w, int | float) for w in weights):
        raise ConfigError(f"loss_weights: got {weights!r}, expected a list of numbers.")
    if len(weights) != len(names):
        raise ConfigError(
            f"loss_weights: got {len(weights)} weights for the {len(names)} losses of loss_type, "
            f"{', '.join(map(str, names))}; give one for each."
        )
    if not all(math.isfinite(weight) and weight >= 0.0 for weight in weights) or not any(weights):
        raise ConfigError(
            f"loss_weights: got {list(weights)}, expected finite numbers of at least 0, not all 0."
        )


def _check_coefficient(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"f_alpha_divergence_coef: got {value!r}, expected a finite number.")


def _with_divergence(loss: Any, config: Any) -> DivergenceLoss:
    try:
        return DivergenceLoss(
            beta=loss.beta,
            label_smoothing=loss.label_smoothing,
            loss=loss,
            divergence=config.f_divergence_type,
            coefficient=config.f_alpha_divergence_coef,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"f_divergence_type: {error}") from error
