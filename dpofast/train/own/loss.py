"""The loss of a run: one of the library's, or a function that the user gives."""

from __future__ import annotations

from dataclasses import fields

from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig
from dpofast.options.named_loss import check_loss_kind
from dpofast.options.weighting_fields import refuse_weighting_of_coupled
from dpofast_kernels import (
    CoupledFunction,
    PairFunction,
    PreferenceLoss,
    make_coupled_custom_loss,
    make_custom_loss,
)


def run_loss(
    config: DPOConfig,
    loss_fn: PairFunction | CoupledFunction | None,
    *,
    takes_answers: bool = False,
) -> PreferenceLoss:
    """The loss that the options name, or the user's own.

    Args:
        config: options of the run.
        loss_fn: the user's function; None for the loss of the options. In a CoupledFunction, the
            loss of a pair may depend on the other pairs.
        takes_answers: whether the trainer takes answers one by one, instead of pairs.

    Raises:
        ConfigError: the function isn't such a loss, the options also name a loss, or the trainer
            can't train the loss of the options.
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
        if isinstance(loss_fn, CoupledFunction):
            function = loss_fn.function
            loss: PreferenceLoss = make_coupled_custom_loss(function, config.beta, config.device)
        else:
            loss = make_custom_loss(loss_fn, config.beta, config.device)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"loss_fn: {error}") from error
    refuse_weighting_of_coupled(loss, config.weighting())
    return loss
