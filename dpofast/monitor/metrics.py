"""Exact means of metrics, however the pairs are spread over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]


class MetricSums:
    """Sums of metrics, added up on the device so that no step waits for a copy to the host.

    A mean is the sum over all pairs, divided by their number. A metric with a count of its own,
    such as tokens, is divided by the sum of that count instead.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._num_pairs = 0

    def add(
        self,
        values: Mapping[str, Tensor],
        num_pairs: int,
        counts: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds the metrics of some pairs.

        Args:
            values: metrics by name; each is either one value per pair [P], or the sum over the
                pairs [].
            num_pairs: P; 0 on a rank without pairs.
            counts: for metrics that aren't means over pairs, what their sums are divided by: one
                number per pair [P], or the sum over the pairs []. A name has a count either in all
                calls or in none.
        """
        _add_up(self._sums, values)
        _add_up(self._counts, counts or {})
        self._num_pairs += num_pairs

    @property
    def totals(self) -> dict[str, Tensor]:
        """Sums over this rank's pairs since the last call of `means`, [] each."""
        return dict(self._sums)

    @property
    def counts(self) -> dict[str, Tensor]:
        """Sums of the counts of those metrics that have one, [] each."""
        return dict(self._counts)

    def recorded(self) -> dict[str, Any]:
        """The sums since the last call of `means`, as JSON types, for `restore`."""
        sums = {name: total.item() for name, total in self._sums.items()}
        counts = {name: total.item() for name, total in self._counts.items()}
        return {"sums": sums, "counts": counts, "num_pairs": self._num_pairs}

    def restore(self, recorded: dict[str, Any]) -> None:
        """Go on from sums that `recorded` returned, bit for bit."""
        self._sums = _tensors(recorded["sums"])
        self._counts = _tensors(recorded.get("counts", {}))  # early versions had none
        self._num_pairs = recorded["num_pairs"]

    def means(self, sum_over_ranks: SumOverRanks, device: torch.device) -> dict[str, float]:
        """Means over the pairs of all ranks since the last call; {} if no rank had any.

        A metric whose count is 0 on all ranks has no mean and is left out.

        Every rank must call this together, and must have called `add` with the same names, even if
        it has no pairs: the ranks add up vectors of the same length.

        Args:
            sum_over_ranks: adds up a float64 vector over the ranks.
            device: device that `sum_over_ranks` expects the vector on.
        """
        if not self._sums:
            return {}
        names, counted = sorted(self._sums), sorted(self._counts)  # the same order on all ranks
        parts = [*(self._sums[name] for name in names), *(self._counts[name] for name in counted)]
        num_pairs = torch.tensor(float(self._num_pairs), dtype=torch.float64)
        vector = torch.stack([part.to(device) for part in (*parts, num_pairs)])
        *totals, pairs = sum_over_ranks(vector).tolist()
        self._sums, self._counts, self._num_pairs = {}, {}, 0
        counts = dict(zip(counted, totals[len(names) :], strict=True))
        found = {}
        for name, total in zip(names, totals, strict=False):
            count = counts.get(name, pairs)
            if count:
                found[name] = total / count
        return found


def _add_up(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        total = value.detach().double().sum()
        sums[name] = sums[name] + total if name in sums else total


def _tensors(numbers: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(total, dtype=torch.float64) for name, total in numbers.items()}
