"""Base classes of the losses: frozen dataclasses that give a value and two derivatives per pair."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss whose mean over pairs is trained: a `PairLoss`, or a `CoupledLoss`.

    A loss may have up to two more numbers as options of its own, which are fields of its class.

    Attributes:
        name: name in the registry.
        takes_label_smoothing: whether the loss has label smoothing.
        takes_divergence: whether other divergences than the reverse KL make sense, because the loss
            depends on the difference of a pair's two log-ratios (`DivergenceLoss`).
        reference_free: whether the loss compares log-probs of the policy, without a reference. All
            "log-ratios" are log-probs of the policy then.
        rewards_per_token: whether the rewards in the metrics are beta times means per token.
        option_names: names of the loss's own options, at most two.
        beta: strength of the pull towards the reference, above 0.
        label_smoothing: probability that a pair's labels are swapped, in [0, 0.5).

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range, or the loss has no label smoothing.
    """

    name: ClassVar[str]
    takes_label_smoothing: ClassVar[bool] = False
    takes_divergence: ClassVar[bool] = False
    reference_free: ClassVar[bool] = False
    rewards_per_token: ClassVar[bool] = False
    option_names: ClassVar[tuple[str, ...]] = ()

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("beta", "label_smoothing", *self.option_names):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}, expected a number.")
        if not (math.isfinite(self.beta) and self.beta > 0.0):
            raise ValueError(f"beta is {self.beta}, expected a finite number above 0.")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, expected at least 0 and below 0.5."
            )
        if self.label_smoothing and not self.takes_label_smoothing:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but the {self.name} loss has none: "
                "set it to 0 or choose a loss that has it, such as sigmoid."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the losses of which this one consists."""
        return (self.name,)

    @property
    def options(self) -> tuple[float, float]:
        """The values of the loss's own options; 0 for those that it doesn't have."""
        first, second = (*(float(getattr(self, name)) for name in self.option_names), 0.0, 0.0)[:2]
        return first, second

    @property
    def is_reference_free(self) -> bool:
        """Whether the loss compares log-probs of the policy, without a reference."""
        return self.reference_free

    @property
    def has_rewards_per_token(self) -> bool:
        """Whether the rewards in the metrics are beta times means per token."""
        return self.rewards_per_token

    def with_beta(self, beta: float) -> Self:
        """The same loss with another beta, also in the losses of which it consists."""
        return replace(self, beta=beta)

    def losses(
        self,
        chosen_logps: Tensor,  # [P]
        rejected_logps: Tensor,  # [P]
        ref_chosen_logps: Tensor,  # [P]
        ref_rejected_logps: Tensor,  # [P]
        lengths: Tensor,  # [P, 2]
    ) -> Tensor:
        """Loss of each pair, which autograd can differentiate.

        Args:
            chosen_logps, rejected_logps: [P] fp64, summed log-probs of the policy, in nats.
            ref_chosen_logps, ref_rejected_logps: [P] fp64, the same of the reference.
            lengths: [P, 2] int64, scored tokens of chosen and rejected.

        Returns:
            [P] fp64.
        """
        raise NotImplementedError

    def losses_and_slopes(
        self,
        chosen_logps: Tensor,  # [P]
        rejected_logps: Tensor,  # [P]
        ref_chosen_logps: Tensor,  # [P]
        ref_rejected_logps: Tensor,  # [P]
        lengths: Tensor,  # [P, 2]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each pair, and the derivatives of their sum.

        Args:
            As in `losses`.

        Returns:
            Losses, d sum / d chosen_logps, d sum / d rejected_logps: [P] each.
        """
        raise NotImplementedError

    def first_value(
        self,
        lengths: Tensor,  # [P, 2]
    ) -> Tensor:
        """Loss of each pair when policy and reference are the same: all log-ratios are 0.

        Args:
            lengths: [P, 2] int64, scored tokens of chosen and rejected.

        Returns:
            [P] fp64.
        """
        zeros = torch.zeros(len(lengths), dtype=torch.float64, device=lengths.device)
        return self.losses(zeros, zeros, zeros, zeros, lengths)


@dataclass(frozen=True)
class PairLoss(PreferenceLoss):
    """A loss that is a sum over pairs. Each term depends only on the pair's two log-ratios.

    Attributes:
        by_answer: whether the derivative by an answer's log-ratio depends on this answer only.
        is_zero: whether the loss is always 0.
    """

    by_answer: ClassVar[bool] = False
    is_zero: ClassVar[bool] = False

    @property
    def is_by_answer(self) -> bool:
        """Whether the derivative by an answer's log-ratio depends on this answer only."""
        return self.by_answer

    def pair_loss(
        self,
        chosen_logratios: Tensor,  # [P]
        rejected_logratios: Tensor,  # [P]
        lengths: Tensor,  # [P, 2]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each pair and its derivatives; autograd can differentiate the loss, too.

        Args:
            chosen_logratios: [P] fp64, summed log-prob of the policy minus the reference's, in
                nats, for the chosen answers.
            rejected_logratios: [P] fp64, the same for the rejected answers.
            lengths: [P, 2] int64, scored tokens of chosen and rejected.

        Returns:
            Loss, d loss / d chosen_logratios, d loss / d rejected_logratios: [P] each.
        """
        raise NotImplementedError

    def losses(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        lengths: Tensor,
    ) -> Tensor:
        logratios = (chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps)
        return self.pair_loss(*logratios, lengths)[0]

    def losses_and_slopes(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logratios = (chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps)
        return self.pair_loss(*logratios, lengths)

    def smoothed_loss(
        self,
        chosen_logratios: Tensor,  # [P]
        rejected_logratios: Tensor,  # [P]
        lengths: Tensor,  # [P, 2]
        smoothing: float | Tensor,  # [] or [P]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`pair_loss` with another label smoothing than the loss's own.

        Args:
            chosen_logratios, rejected_logratios, lengths: as in `pair_loss`.
            smoothing: probability that a pair's labels are swapped, in [0, 1]; a number for all
                pairs, or [P] fp64.

        Returns:
            As `pair_loss`.

        Raises:
            ValueError: the loss has no label smoothing.
        """
        raise ValueError(f"The {self.name} loss has no label smoothing, so none for each pair.")

    def direction(
        self,
        lengths: Tensor,  # [P, 2]
    ) -> Tensor | None:
        """A fixed direction for each pair: the pair's two derivatives are always a multiple of it.

        The direction depends on the lengths only, not on the log-probs. If a pair is too long for
        one chunk, its gradient can be summed along this direction before its loss is known. Its
        logits are then computed only once.

        Args:
            lengths: [P, 2] int64, scored tokens of chosen and rejected.

        Returns:
            [P, 2] fp64, or None if the two derivatives have no fixed ratio.
        """
        return None


@dataclass(frozen=True)
class SmoothedLoss(PairLoss):
    """A loss whose formula, `smoothed_loss`, takes one label smoothing or one for each pair."""

    takes_label_smoothing: ClassVar[bool] = True

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (chosen_logratios, rejected_logratios, lengths)
        return self.smoothed_loss(*inputs, self.label_smoothing)


@dataclass(frozen=True)
class ZeroLoss(PairLoss):
    """No loss of pairs: only the coefficients of sequences are trained (see `linear_pair_loss`)."""

    name: ClassVar[str] = "zero"
    by_answer: ClassVar[bool] = True
    reference_free: ClassVar[bool] = True
    is_zero: ClassVar[bool] = True

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        nothing = torch.zeros_like(chosen_logratios)
        return nothing, nothing, nothing


def same_for_all(value: float, lengths: Tensor) -> Tensor:
    """[P] fp64: a first value that doesn't depend on the pair's lengths [P, 2]."""
    return torch.full((len(lengths),), value, dtype=torch.float64, device=lengths.device)


def along_difference(lengths: Tensor) -> Tensor:
    """[P, 2] fp64: direction of a loss of the difference of the two log-ratios."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64, device=lengths.device)
    return signs.expand(len(lengths), 2)


def along_mean_difference(lengths: Tensor) -> Tensor:
    """[P, 2] fp64: direction of a loss of the difference of the mean log-ratios per token."""
    return along_difference(lengths) / lengths
