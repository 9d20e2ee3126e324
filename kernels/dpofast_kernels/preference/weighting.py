"""WPO's weights of pairs: the likelier the policy is to write both answers, the more a pair counts.

Source: WPO, arXiv:2406.11827, equation 2 with the alignment of weights of its section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PairWeighting:
    """The weight of a pair, by which its loss is multiplied: w_chosen w_rejected.

    The w of an answer is exp of the mean over its tokens of ln p(token) - ln sum(p^2). An answer
    that is sampled from the policy has a w of about 1 this way. No gradient goes through it.

    Attributes:
        clamp: the largest weight of a pair, above 0; None for no limit. The authors' code has 1.

    Raises:
        TypeError: clamp is not a number.
        ValueError: clamp is out of range.
    """

    clamp: float | None = None

    def __post_init__(self) -> None:
        clamp = self.clamp
        if clamp is None:
            return
        if not isinstance(clamp, (int, float)) or isinstance(clamp, bool):
            raise TypeError(f"clamp is {clamp!r}, expected a number or None.")
        if not (math.isfinite(clamp) and clamp > 0.0):
            raise ValueError(f"clamp is {clamp}, expected a finite number above 0.")

    def weights(
        self,
        aligned_logps: Tensor,  # [P, 2]
        lengths: Tensor,  # [P, 2]
    ) -> Tensor:
        """The weight of each pair.

        Args:
            aligned_logps: [P, 2] fp64, sums over the tokens of chosen and rejected of
                ln p(token) - ln sum(p^2), in nats.
            lengths: [P, 2] int64, their numbers of tokens.

        Returns:
            [P] fp64, without gradient.
        """
        weights = (aligned_logps.detach() / lengths).sum(1).exp()
        return weights if self.clamp is None else weights.clamp(max=self.clamp)
