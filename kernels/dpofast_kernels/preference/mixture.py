"""Weighted sums of losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from dpofast_kernels.preference.loss import PairLoss, PreferenceLoss

Part = TypeVar("Part", bound=PreferenceLoss)


@dataclass(frozen=True, kw_only=True)
class WeightedSum(PreferenceLoss, Generic[Part]):
    """The sum of weight x loss over several losses of the same beta, as in MPO, arXiv:2411.10442.

    Attributes:
        parts: the losses. label_smoothing is that of the parts that have it.
        weights: their weights, finite and at least 0; one of them is above 0.

    Raises:
        ValueError: the numbers of losses and weights differ, a weight is out of range, or the
            losses differ in beta, or only some of them need a reference.
    """

    name: ClassVar[str] = "mixture"
    takes_label_smoothing: ClassVar[bool] = True

    parts: tuple[Part, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mixture(self.parts, self.weights, self.beta)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts."""
        return tuple(name for part in self.parts for name in part.names)

    def with_beta(self, beta: float) -> Self:
        return replace(self, beta=beta, parts=tuple(part.with_beta(beta) for part in self.parts))

    def first_value(self, lengths: Tensor) -> Tensor:
        values = [part.first_value(lengths) * weight for part, weight in self._weighted()]
        return torch.stack(values).sum(0)

    def _weighted(self) -> list[tuple[Part, float]]:
        """The parts with their weights, without those of weight 0: 0 times infinity is NaN."""
        return [each for each in zip(self.parts, self.weights, strict=True) if each[1]]


@dataclass(frozen=True, kw_only=True)
class MixtureLoss(WeightedSum[PairLoss], PairLoss):
    """A `WeightedSum` of losses that are sums over pairs."""

    @property
    def is_reference_free(self) -> bool:
        return self.parts[0].is_reference_free

    @property
    def has_rewards_per_token(self) -> bool:
        return all(part.has_rewards_per_token for part, _ in self._weighted())

    @property
    def is_by_answer(self) -> bool:
        return all(part.is_by_answer for part, _ in self._weighted())

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (chosen_logratios, rejected_logratios, lengths)
        return _sum((part.pair_loss(*inputs), weight) for part, weight in self._weighted())

    def smoothed_loss(
        self,
        chosen_logratios: Tensor,
        rejected_logratios: Tensor,
        lengths: Tensor,
        smoothing: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (chosen_logratios, rejected_logratios, lengths, smoothing)
        return _sum((part.smoothed_loss(*inputs), weight) for part, weight in self._weighted())

    def direction(self, lengths: Tensor) -> Tensor | None:
        found = [part.direction(lengths) for part, _ in self._weighted()]
        first = found[0]
        if first is None or any(each is None or not torch.equal(each, first) for each in found):
            return None
        return first


def check_mixture(parts: Sequence[PreferenceLoss], weights: Sequence[float], beta: float) -> None:
    """Check the parts of a weighted sum.

    Raises:
        ValueError: the numbers of losses and weights differ, a weight is out of range, or the
            losses differ in beta, or only some of them need a reference.
    """
    if len(weights) != len(parts):
        raise ValueError(
            f"There are {len(weights)} weights for {len(parts)} losses; give one for each."
        )
    if not all(math.isfinite(weight) and weight >= 0.0 for weight in weights):
        raise ValueError(f"The weights are {list(weights)}, expected finite numbers of at least 0.")
    if not any(weights):
        raise ValueError("All weights are 0, so nothing would be trained.")
    if any(part.beta != beta for part in parts):
        raise ValueError("The losses of a mixture differ in beta, expected the same.")
    free = [part.name for part in parts if part.is_reference_free]
    if free and len(free) < len(parts):
        other = next(part.name for part in parts if not part.is_reference_free)
        raise ValueError(
            f"The {free[0]} loss has no reference, but the {other} loss needs one, so they can't "
            "be mixed; choose losses of one kind."
        )


def _sum(
    terms: Iterable[tuple[tuple[Tensor, Tensor, Tensor], float]],
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of losses and of their derivatives, [P] each."""
    loss, d_chosen, d_rejected = torch.stack(
        [torch.stack(each) * weight for each, weight in terms]
    ).sum(0)  # [3, P]
    return loss, d_chosen, d_rejected
