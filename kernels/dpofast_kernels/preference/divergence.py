"""Losses of f-DPO, in which another divergence than the reverse KL regularises the policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.preference.loss import PairLoss

# Scores and their derivatives: [P] fp64 each.
Scores = tuple[Tensor, Tensor]

# TRL clamps the exponent of alpha_divergence here, so that float32 holds the score. It doesn't
# clamp that of forward_kl, which becomes infinite there. Gradients overflow float32 earlier.
LARGEST_EXPONENT = 80.0


def _reverse_kl(logratios: Tensor, coefficient: float) -> Scores:
    return logratios, torch.ones_like(logratios)


def _forward_kl(logratios: Tensor, coefficient: float) -> Scores:
    return _power(logratios, -1.0)


def _js_divergence(logratios: Tensor, coefficient: float) -> Scores:
    return math.log(2.0) + F.logsigmoid(logratios), torch.sigmoid(-logratios)


def _alpha_divergence(logratios: Tensor, coefficient: float) -> Scores:
    power = coefficient - 1.0
    if abs(power) < 1e-6:
        return _reverse_kl(logratios, coefficient)
    return _power(logratios, power)


def _power(logratios: Tensor, power: float) -> Scores:
    """(ratio^power - 1) / power and its derivative by the log-ratio, which is ratio^power."""
    exponents = power * logratios
    clamped = exponents.clamp(max=LARGEST_EXPONENT)
    slopes = torch.where(exponents <= LARGEST_EXPONENT, torch.exp(clamped), 0.0)
    return torch.expm1(clamped) / power, slopes


DIVERGENCES: dict[str, Callable[[Tensor, float], Scores]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}


@dataclass(frozen=True, kw_only=True)
class DivergenceLoss(PairLoss):
    """A loss of DPO's kind with f'(ratio) in place of each log-ratio u.

    f'(ratio) is u for reverse_kl (DPO), 1 - exp(-u) for forward_kl, log 2 + log sigmoid(u) for
    js_divergence, and (exp((c - 1) u) - 1) / (c - 1) for alpha_divergence. Exponents are clamped at
    80, beyond which a score is constant.

    Source: f-DPO, arXiv:2309.16240, table 1; c is one minus the alpha of the paper.

    Attributes:
        loss: the loss of the scores, with the same beta and label_smoothing.
        divergence: a name in DIVERGENCES.
        coefficient: c of alpha_divergence; others don't use it.

    Raises:
        ValueError: the divergence is unknown, the loss isn't defined by differences of log-ratios,
            the coefficient isn't finite, or beta or label_smoothing differ from the loss's.
        TypeError: the coefficient isn't a number.
    """

    name: ClassVar[str] = "divergence"
    takes_label_smoothing: ClassVar[bool] = True

    loss: PairLoss
    divergence: str
    coefficient: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"Unknown divergence {self.divergence!r}; there are {', '.join(DIVERGENCES)}."
            )
        for name in ("beta", "label_smoothing"):
            if getattr(self, name) != getattr(self.loss, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but that of the loss is "
                    f"{getattr(self.loss, name)}; expected the same."
                )
        for part in getattr(self.loss, "parts", (self.loss,)):
            if not part.takes_divergence:
                raise ValueError(
                    f"The {part.name} loss has no other divergence than reverse_kl, because it "
                    "isn't a loss of the difference of two log-ratios."
                )
        if not isinstance(self.coefficient, (int, float)) or isinstance(self.coefficient, bool):
            raise TypeError(f"The coefficient is {self.coefficient!r}, expected a number.")
        if not math.isfinite(self.coefficient):
            raise ValueError(f"The coefficient is {self.coefficient}, expected a finite number.")

    @property
    def names(self) -> tuple[str, ...]:
        """The name of the loss."""
        return self.loss.names

    def with_beta(self, beta: float) -> Self:
        return replace(self, beta=beta, loss=self.loss.with_beta(beta))

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected, slopes = self._scores(chosen_logratios, rejected_logratios)
        loss, d_chosen, d_rejected = self.loss.pair_loss(chosen, rejected, lengths)
        return loss, d_chosen * slopes[0], d_rejected * slopes[1]

    def smoothed_loss(
        self,
        chosen_logratios: Tensor,
        rejected_logratios: Tensor,
        lengths: Tensor,
        smoothing: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected, slopes = self._scores(chosen_logratios, rejected_logratios)
        loss, d_chosen, d_rejected = self.loss.smoothed_loss(chosen, rejected, lengths, smoothing)
        return loss, d_chosen * slopes[0], d_rejected * slopes[1]

    def _scores(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor, Scores]:
        """Scores of the chosen and of the rejected log-ratios, and the derivatives of both."""
        score = DIVERGENCES[self.divergence]
        chosen_scores, chosen_slopes = score(chosen, self.coefficient)
        rejected_scores, rejected_slopes = score(rejected, self.coefficient)
        return chosen_scores, rejected_scores, (chosen_slopes, rejected_slopes)

    def first_value(self, lengths: Tensor) -> Tensor:
        return self.loss.first_value(lengths)  # every score is 0 where the log-ratio is
