"""Sums of per-pair metrics, for exact means however pairs are spread over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]


class MetricSums:
    """Adds up metrics on the device; nothing is copied off it before `means`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._num_pairs = 0

    def add(self, values: dict[str, Tensor], num_pairs: int) -> None:
        """Add values of `num_pairs` pairs: [P] each, or a sum over them already."""
        for name, value in values.items():
            total = value.detach().double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._num_pairs += num_pairs

    def means(self, sum_over_ranks: SumOverRanks, device: torch.device) -> dict[str, float]:
        """Means over the pairs of all ranks since the last call; {} where no rank has any.

        Every rank must call this, and must have called `add`, if only for zero pairs.

        Args:
            sum_over_ranks: of a float64 vector.
            device: where that vector is to be.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        count = torch.tensor(float(self._num_pairs), dtype=torch.float64, device=device)
        vector = torch.stack([*(self._sums[name].to(device) for name in names), count])
        *totals, num_pairs = sum_over_ranks(vector).tolist()
        self._sums, self._num_pairs = {}, 0
        if not num_pairs:
            return {}
        return {name: total / num_pairs for name, total in zip(names, totals, strict=True)}
