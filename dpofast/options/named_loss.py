"""The loss that a run's options name."""

from __future__ import annotations

import math
from typing import Any

from dpofast.data.packing.likelihood import Likelihood
from dpofast.errors import ConfigError
from dpofast.options.beta_fields import check_beta_fields
from dpofast.options.metric_fields import USUAL_METRICS
from dpofast.options.weighting_fields import refuse_weighting_of_coupled
from dpofast_kernels import (
    COUPLED_LOSSES,
    LOSS_OPTIONS,
    LOSSES,
    UNPAIRED_LOSSES,
    DivergenceLoss,
    PreferenceLoss,
    UnpairedLoss,
    ZeroLoss,
    make_coupled_loss,
    make_mixture,
    make_unpaired_loss,
    unknown_loss,
)

REVERSE_KL = "reverse_kl"
# Options that only losses of single answers have.
UNPAIRED_OPTIONS = ("desirable_weight", "undesirable_weight")
# Names of losses that have a likelihood term. Of sft it is the only one.
SFT, ORPO = "sft", "orpo"
CPO_ALPHAS = {"cpo": 1.0, "cpo_hinge": 1.0, "cpo_ipo": 1.0, "simpo": 0.0, "alphapo": 0.0}
LOSS_NAMES = (*LOSSES, *COUPLED_LOSSES, SFT, *UNPAIRED_LOSSES)


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
    for name in names:
        if name not in LOSS_NAMES:
            raise ConfigError(f"loss_type: {unknown_loss(name, LOSS_NAMES)}")
    check_beta_fields(config)
    if is_unpaired(config):
        return _unpaired_loss(config)
    _check_coefficient(config.f_alpha_divergence_coef)
    _check_cpo_alpha(config.cpo_alpha)
    _check_ld_alpha(config)
    of_pairs = {name: weight for name, weight in _weights(config).items() if name != SFT}
    if not any(of_pairs.values()):
        _refuse_options_of_pairs(config)
        return _checked(ZeroLoss(config.beta), config)
    given = None if weights is None else list(of_pairs.values())
    options = [option for option, losses in LOSS_OPTIONS.items() if set(losses) & set(of_pairs)]
    own = {option: getattr(config, option) for option in options}
    try:
        make = make_coupled_loss if set(of_pairs) & set(COUPLED_LOSSES) else make_mixture
        loss: PreferenceLoss = make(
            *(list(of_pairs), given, config.beta, config.label_smoothing), **own
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if config.f_divergence_type != REVERSE_KL:
        loss = _with_divergence(loss, config)
    return _checked(loss, config)


def is_unpaired(config: Any) -> bool:
    """Whether the loss takes answers one by one; loss_type has been checked."""
    return any(name in UNPAIRED_LOSSES for name in config.loss_type)


def check_loss_kind(config: Any, *, takes_answers: bool) -> None:
    """Refuse a loss of single answers in a trainer of pairs, and the reverse.

    Raises:
        ConfigError: the loss is of the other kind.
    """
    if is_unpaired(config) == takes_answers:
        return
    name = " + ".join(config.loss_type)
    if takes_answers:
        raise ConfigError(
            f"loss_type: KTOTrainer trains {' or '.join(UNPAIRED_LOSSES)}, but got {name}, a loss "
            "of pairs; use DPOTrainer."
        )
    raise ConfigError(
        f"loss_type: {name} takes answers one by one, and DPOTrainer trains pairs; use KTOTrainer."
    )


def _unpaired_loss(config: Any) -> UnpairedLoss:
    """The loss of single answers that the options name."""
    name = next(name for name in config.loss_type if name in UNPAIRED_LOSSES)
    if len(config.loss_type) > 1:
        raise ConfigError(
            f"loss_type: {name} can't be mixed with other losses, but got "
            f"{', '.join(config.loss_type)}; name one loss."
        )
    neutral: dict[str, tuple[Any, ...]] = {
        "loss_weights": (None, [1.0]),
        "label_smoothing": (0.0,),
        "f_divergence_type": (REVERSE_KL,),
        "ld_alpha": (None, 1.0),
        "target_kl": (None,),
        "use_weighting": (False,),
        "metrics": (list(USUAL_METRICS), []),
    }
    for option, values in neutral.items():
        if getattr(config, option) not in values:
            raise ConfigError(
                f"{option} is {getattr(config, option)!r}, but the {name} loss has none; leave it "
                "out."
            )
    weights = (getattr(config, option) for option in UNPAIRED_OPTIONS)
    try:
        return make_unpaired_loss(name, config.beta, *weights)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _checked(loss: PreferenceLoss, config: Any) -> PreferenceLoss:
    """The loss, unless an option needs a reference or log-probs that it doesn't have."""
    names = " + ".join(config.loss_type)
    if config.length_discount() is not None:
        if loss.is_reference_free:
            raise ConfigError(
                f"ld_alpha is {config.ld_alpha}, but it discounts log-ratios, and the loss {names} "
                "has no reference; leave it out."
            )
        if named_likelihood(config):
            raise ConfigError(
                f"ld_alpha is {config.ld_alpha}, but the {SFT} part of the loss counts all tokens "
                f"of an answer; leave out either ld_alpha or {SFT}."
            )
    if loss.is_reference_free and config.target_kl is not None:
        raise ConfigError(
            f"target_kl is {config.target_kl}, but the loss {names} has no "
            "reference to be near; leave it out."
        )
    refuse_weighting_of_coupled(loss, config.weighting())
    return loss


def named_likelihood(config: Any) -> Likelihood:
    """The likelihood terms of the losses that the options of a DPOConfig name."""
    weights = _weights(config)
    answers = weights.get(SFT, 0.0)
    answers += sum(weights[name] * alpha for name, alpha in cpo_alphas(config).items())
    return Likelihood(answers, weights.get(ORPO, 0.0))


def cpo_alphas(config: Any) -> dict[str, float]:
    """The weight of the likelihood in each loss of CPOTrainer that the run has."""
    return {
        name: usual if config.cpo_alpha is None else float(config.cpo_alpha)
        for name, usual in CPO_ALPHAS.items()
        if name in config.loss_type
    }


def loss_names(config: Any, loss: PreferenceLoss) -> list[str]:
    """The names of the losses that a run sums, as in the option loss_type.

    Args:
        config: the options.
        loss: the pair loss of the run, which a user may have replaced.
    """
    return list(config.loss_type) if loss == named_loss(config) else list(loss.names)


def _weights(config: Any) -> dict[str, float]:
    """The weight of each loss by its name.

    Raises:
        ConfigError: a name occurs twice.
    """
    names = config.loss_type
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"loss_type: {twice} occurs twice; name it once, with a weight.")
    weights = [1.0] * len(names) if config.loss_weights is None else config.loss_weights
    return dict(zip(names, map(float, weights), strict=True))


def _refuse_options_of_pairs(config: Any) -> None:
    if config.label_smoothing:
        raise ConfigError(
            f"label_smoothing is {config.label_smoothing}, but the {SFT} loss has none: set it to "
            "0 or choose a loss that has it, such as sigmoid."
        )
    if config.f_divergence_type != REVERSE_KL:
        raise ConfigError(
            f"f_divergence_type is {config.f_divergence_type}, but the {SFT} loss compares "
            "nothing with the reference; leave it out."
        )
    if config.use_weighting:
        raise ConfigError(
            f"use_weighting is true, but it weights losses of pairs, and the {SFT} loss has none; "
            "leave it out."
        )


def _check_cpo_alpha(value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and math.isfinite(value) and value >= 0.0):
        raise ConfigError(f"cpo_alpha: got {value!r}, expected a finite number of at least 0.")


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


def _check_ld_alpha(config: Any) -> None:
    alpha = config.ld_alpha
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha is not None and not (is_number and 0.0 <= alpha <= 1.0):
        raise ConfigError(f"ld_alpha: got {alpha!r}, expected a number from 0 to 1.")
    if config.length_discount() is not None and config.reference_store_detail == "sums":
        raise ConfigError(
            f"reference_store_detail: got 'sums', but ld_alpha={alpha:g} needs the reference's "
            "log-prob of each token; set it to 'logps', or leave ld_alpha out."
        )


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
