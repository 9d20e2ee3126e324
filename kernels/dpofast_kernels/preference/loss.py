"""Base class of the losses: a frozen dataclass that gives a value and two derivatives per pair."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class PairLoss:
    """A loss that is a sum over pairs. Each term depends only on the pair's two log-ratios.

    Attributes:
        name: name in the registry.
        takes_label_smoothing: whether the loss has label smoothing.
        beta: strength of the pull towards the reference, above 0.
        label_smoothing: probability that a pair's labels are swapped, in [0, 0.5).

    Raises:
        TypeError: beta or label_smoothing is not a number.
        ValueError: beta or label_smoothing is out of range, or the loss has no label smoothing.
    """

    name: ClassVar[str]
    takes_label_smoothing: ClassVar[bool] = False

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("beta", "label_smoothing"):
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
                "set it to 0 or choose the sigmoid loss."
            )

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

    def direction(
        self,
        lengths: Tensor,  # [P, 2]
    ) -> Tensor | None:
        """A fixed direction for each pair: the pair's two derivatives are always a multiple of it.

        The direction depends on the lengths only, not on the log-probs. If a pair is too long for
        one chunk, its gradient can be summed along this direction before its loss is known.

        Args:
            lengths: [P, 2] int64, scored tokens of chosen and rejected.

        Returns:
            [P, 2] fp64, or None if the two derivatives have no fixed ratio.
        """
        return None
