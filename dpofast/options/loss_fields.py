"""Options that decide the loss beside `loss_type`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from dpofast.data.packing.likelihood import Likelihood
from dpofast.options.beta_fields import beta_facts, unused_beta_options
from dpofast.options.named_loss import (
    CPO_ALPHAS,
    REVERSE_KL,
    SFT,
    UNPAIRED_OPTIONS,
    cpo_alphas,
    named_likelihood,
    named_loss,
)
from dpofast.options.weighting_fields import (
    WeightingFields,
    unused_weighting_options,
    weighting_facts,
)
from dpofast_kernels import DIVERGENCES, LOSS_OPTIONS, UNPAIRED_LOSSES, PreferenceLoss

# Defaults of this version and of older ones of TRL.
USUAL_COEFFICIENTS = (0.5, 1.0)


# kw_only keeps the positional order of TrainingArguments and of DPOConfig's own options.
@dataclass(kw_only=True)
class LossFields(WeightingFields):
    """The fields; docs/losses.md has the formulas.

    Attributes:
        loss_weights: a weight for each loss of loss_type, at least 0; None for 1 each.
        f_divergence_type: reverse_kl, forward_kl, js_divergence or alpha_divergence.
        f_alpha_divergence_coef: coefficient of alpha_divergence.
        ld_alpha: LD-DPO's alpha, in [0, 1]: how much the log-probs count of the tokens by which an
            answer is longer than the other one of its pair; None for as much as the others.
        discopop_tau: tau of the discopop loss, above 0 and at most 1.
        dpop_lambda: lambda of the dpop loss, at least 0.
        simpo_gamma: margin of the losses simpo and alphapo, in units of the margin that the sigmoid
            gets.
        alpha: alpha of the alphapo loss.
        cpo_alpha: weight of the likelihood of chosen answers in the losses without a reference that
            TRL's CPOTrainer has: cpo, cpo_hinge, cpo_ipo, simpo and alphapo. None for 1 in the
            first three, as in CPO's paper, and for 0 in the others, as in theirs.
        desirable_weight, undesirable_weight: factors of the losses of desirable and of undesirable
            answers in kto and apo_zero_unpaired, at least 0.
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
    ld_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the tokens by which an answer is the longer one; 0 to 1."},
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Tau of the discopop loss."})
    dpop_lambda: float = field(default=50.0, metadata={"help": "Lambda of the dpop loss."})
    simpo_gamma: float = field(
        default=0.5, metadata={"help": "Margin of the losses simpo and alphapo."}
    )
    alpha: float = field(default=0.0, metadata={"help": "Alpha of the alphapo loss."})
    cpo_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the likelihood in cpo (1 by default), simpo and alphapo (0)."},
    )

    desirable_weight: float = field(
        default=1.0, metadata={"help": "Factor of the losses of desirable answers (kto)."}
    )
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "Factor of the losses of undesirable answers (kto)."}
    )

    def make_loss(self) -> PreferenceLoss:
        """The loss that these options name.

        Raises:
            ConfigError: an unknown name, or an option out of range.
        """
        return named_loss(self)

    def likelihood(self) -> Likelihood:
        """The likelihood terms that these options add to the pair loss."""
        return named_likelihood(self)

    def length_discount(self) -> float | None:
        """`ld_alpha`; None where it changes nothing."""
        return None if self.ld_alpha == 1.0 else self.ld_alpha


OPTIONS_OF_LOSSES = {
    **LOSS_OPTIONS,
    "cpo_alpha": tuple(CPO_ALPHAS),
    **dict.fromkeys(UNPAIRED_OPTIONS, tuple(UNPAIRED_LOSSES)),
}
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
        f"{option}={getattr(config, option)!r} (only the loss {' or '.join(losses)} has it)"
        for option, losses in OPTIONS_OF_LOSSES.items()
        if not set(losses) & set(config.loss_type) and getattr(config, option) != _DEFAULTS[option]
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
    if config.beta_schedule != "constant" and set(config.loss_type) == {SFT}:
        remarks.append(f"beta_schedule={config.beta_schedule!r} ({SFT} has no beta)")
    return remarks + unused_beta_options(config) + unused_weighting_options(config)


def loss_facts(config: Any) -> dict[str, Any]:
    """The options of the loss as far as they have an effect; None for those without."""
    weights, divergence = config.loss_weights, config.f_divergence_type
    is_alpha = divergence == "alpha_divergence"
    return {
        **beta_facts(config),
        **weighting_facts(config),
        "loss_weights": None if weights is None or set(weights) == {1.0} else list(weights),
        "f_divergence_type": divergence,
        "f_alpha_divergence_coef": config.f_alpha_divergence_coef if is_alpha else None,
        "ld_alpha": config.length_discount(),
        **{
            option: getattr(config, option) if set(losses) & set(config.loss_type) else None
            for option, losses in OPTIONS_OF_LOSSES.items()
        },
        "cpo_alpha": cpo_alphas(config) or None,
    }
