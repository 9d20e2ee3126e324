"""Statistics of each row's softmax: their names, and how the "torch" back end computes them.

With E = exp(z - k) for finished logits z and a reference k per row, and S the sum of E over the
vocabulary,

    entropy          ln S - sum(E (z - k)) / S
    mean_logit       sum(z) / V
    is_top           1 if the label's z is the maximum, else 0
    log_sum_p2       ln sum(E^2) - 2 ln S

Where one token has nearly all probability, S and sum(E^2) are close to 1 and their logarithms close
to 0. So the sums leave out the label, and ln S is log1p of the sum without it. That keeps all
digits if the label is that token. If it is another one, the error is a few roundings of 1. In
the Triton back ends, whose k is the label's logit, it is a few roundings of the label's log-prob.
"""

from __future__ import annotations

import torch
from torch import Tensor

STATISTICS = ("entropy", "mean_logit", "is_top", "log_sum_p2")
# exp of this is 0 in fp64. Differences below it, such as -inf, become it: 0 * -inf would be NaN.
LOWEST = -1000.0


def check_statistics(statistics: tuple[str, ...]) -> None:
    """Check the names of statistics that were asked for.

    Raises:
        TypeError: `statistics` is not a tuple of strings.
        ValueError: a name is unknown, or comes twice.
    """
    if not isinstance(statistics, tuple) or not all(isinstance(name, str) for name in statistics):
        raise TypeError(f"statistics is {statistics!r}, expected a tuple of names.")
    for name in statistics:
        if name not in STATISTICS:
            raise ValueError(
                f"Unknown statistic {name!r} in statistics, expected names of "
                f"{', '.join(STATISTICS)}."
            )
        if statistics.count(name) > 1:
            raise ValueError(f"statistics names {name!r} more than once: name it once.")


class RowStatistics:
    """Sums over the vocabulary, block by block, and the statistics that they give.

    The reference k is the row's maximum.

    Args:
        statistics: names that were asked for.
        zeros: [n, 1] fp64.
    """

    def __init__(self, statistics: tuple[str, ...], zeros: Tensor) -> None:
        self.statistics = statistics
        self.wants_differences = "entropy" in statistics
        self._logits = self._moments = self._squares = zeros

    def add_logits(self, z: Tensor) -> None:
        """Add a block of finished logits, the label's included."""
        if "mean_logit" in self.statistics:
            self._logits = self._logits + _row_sums(z)

    def add_exponentials(self, e: Tensor, differences: Tensor) -> None:
        """Add a block of E, in which the label's entry is 0.

        Args:
            e: [n, b] exp(z - k).
            differences: [n, b] z - k; read and overwritten only if `wants_differences`.
        """
        if self.wants_differences:
            self._moments = self._moments + _row_sums(differences.clamp_(min=LOWEST).mul_(e))
        if "log_sum_p2" in self.statistics:
            self._squares = self._squares + _row_sums(e.square())

    def finish(
        self, rest: Tensor, gaps: Tensor, vocab_size: int, dtype: torch.dtype
    ) -> Tensor | None:
        """[K, n] statistics, None if none was asked for.

        Args:
            rest: [n, 1] fp64, the sum of E without the label.
            gaps: [n, 1] fp64, k minus the label's logit.
            vocab_size: V.
            dtype: dtype of the result.
        """
        if not self.statistics:
            return None
        is_top, label = gaps <= 0.0, gaps.neg().exp()  # E of the label
        excess = _beyond_one(rest, label, is_top)
        found = {"is_top": is_top.double()}
        if "mean_logit" in self.statistics:
            found["mean_logit"] = self._logits / vocab_size
        if "entropy" in self.statistics:
            moments = self._moments + label * gaps.neg().clamp(min=LOWEST)
            found["entropy"] = excess.log1p() - moments / (rest + label)
        if "log_sum_p2" in self.statistics:
            squares = _beyond_one(self._squares, label.square(), is_top)
            found["log_sum_p2"] = (squares.log1p() - 2.0 * excess.log1p()).clamp(max=0.0)
        return torch.stack([found[name][:, 0] for name in self.statistics]).to(dtype)


def _row_sums(block: Tensor) -> Tensor:
    return block.sum(-1, keepdim=True).double()


def _beyond_one(rest: Tensor, label: Tensor, is_top: Tensor) -> Tensor:
    """rest + label - 1, where the largest term of the sum is 1; that is the label's if `is_top`."""
    return torch.where(is_top, rest, (rest - 1.0 + label).clamp(min=0.0))
