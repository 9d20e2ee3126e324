"""The loss of a run: one of the library's, or a function that the user gives."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig
from dpofast.options.loss_fields import check_loss_kind
from dpofast_kernels import PairFunction, make_custom_loss


def run_loss(
    config: DPOConfig, loss_fn: PairFunction | None, *, takes_answers: bool = False
) -> Any:
    """The loss that the options name, or the user's own.

    Args:
        config: options of the run.
        loss_fn: the user's function; None for the loss of the options.
        takes_answers: whether the trainer takes answers one by one, instead of pairs.

    Raises:
        ConfigError: the function isn't a loss of single pairs, the options also name a loss, or
            the trainer can't train the loss of the options.
    """
    check_loss_kind(config, takes_answers=takes_answers)
    if loss_fn is None:
        return config.make_loss()
    default = next(item for item in fields(DPOConfig) if item.name == "loss_type").default_factory
    if config.loss_type != default():  # type: ignore[operator]
        raise ConfigError(
            f"loss_fn: loss_type is {config.loss_type}, too, but one loss is trained; leave one of "
            "them out."
        )
    neutral = {
        "loss_weights": (None, [1.0]),
        "f_divergence_type": ("reverse_kl",),
        "beta_schedule": ("constant",),
        "target_kl": (None,),
    }
    for name, values in neutral.items():
        if getattr(config, name) not in values:
            raise ConfigError(
                f"loss_fn: {name} is {getattr(config, name)!r}, which only losses of loss_type "
                "have; leave it out."
            )
    if config.label_smoothing:
        raise ConfigError(
            f"loss_fn: label_smoothing is {config.label_smoothing}, which only losses of loss_type "
            "have; leave it out, and let the function smooth its labels."
        )
    try:
        return make_custom_loss(loss_fn, config.beta, config.device)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"loss_fn: {error}") from error
