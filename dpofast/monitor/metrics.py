"""Exact means of per-pair metrics, however the pairs are spread over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]


class MetricSums:
    """Sums of metrics, added up on the device so that no step waits for a copy to the host."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._num_pairs = 0

    def add(self, values: dict[str, Tensor], num_pairs: int) -> None:
        """Adds the metrics of some pairs.

        Args:
            values: metrics by name; each is either one value per pair [P], or the sum over the
                pairs [].
            num_pairs: P; 0 on a rank without pairs.
        """
        for name, value in values.items():
            total = value.detach().double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._num_pairs += num_pairs

    @property
    def totals(self) -> dict[str, Tensor]:
        """Sums over this rank's pairs since the last call of `means`, [] each."""
        return dict(self._sums)

    def recorded(self) -> dict[str, Any]:
        """The sums since the last call of `means`, as JSON types, for `restore`."""
        sums = {name: total.item() for name, total in self._sums.items()}
        return {"sums": sums, "num_pairs": self._num_pairs}

    def restore(self, recorded: dict[str, Any]) -> None:
        """Go on from sums that `recorded` returned, bit for bit."""
        self._sums = {
            name: torch.tensor(total, dtype=torch.float64)
            for name, total in recorded["sums"].items()
        }
        self._num_pairs = recorded["num_pairs"]

    def means(self, sum_over_ranks: SumOverRanks, device: torch.device) -> dict[str, float]:
        """Means over the pairs of all ranks since the last call; {} if no rank had any.

        Every rank must call this together, and must have called `add` with the same names, even if
        it has no pairs: the ranks add up vectors of the same length.

        Args:
            sum_over_ranks: adds up a float64 vector over the ranks.
            device: device that `sum_over_ranks` expects the vector on.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)  # the same order on all ranks
        count = torch.tensor(float(self._num_pairs), dtype=torch.float64, device=device)
        vector = torch.stack([*(self._sums[name].to(device) for name in names), count])
        *totals, num_pairs = sum_over_ranks(vector).tolist()
        self._sums, self._num_pairs = {}, 0
        if not num_pairs:
            return {}
        return {name: total / num_pairs for name, total in zip(names, totals, strict=True)}
