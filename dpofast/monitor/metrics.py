"""Exact means of per-pair metrics, however the pairs are spread over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]


class MetricSums:
    """Sums of metrics, added up on the device so that no step waits for a copy to the host."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}  # pairs of metrics that not all pairs have
        self._num_pairs = 0

    def add(self, values: Mapping[str, Tensor], num_pairs: int) -> None:
        """Adds the metrics of some pairs.

        Args:
            values: metrics by name; each is either one value per pair [P], or the sum over the
                pairs [].
            num_pairs: P; 0 on a rank without pairs.
        """
        _add_to(self._sums, values)
        self._num_pairs += num_pairs

    def add_some(self, values: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> None:
        """Adds metrics that only some of the pairs have, which `add` has counted.

        Args:
            values: metrics by name, as in `add`.
            counts: how many pairs have them, [], by the same names.
        """
        _add_to(self._sums, values)
        _add_to(self._counts, counts)

    def add_all(self, other: MetricSums, num_pairs: int) -> None:
        """Adds what another has added up over this number of pairs."""
        self.add(other.totals, num_pairs)
        _add_to(self._counts, other.counts)

    @property
    def totals(self) -> dict[str, Tensor]:
        """Sums over this rank's pairs since the last call of `means`, [] each."""
        return dict(self._sums)

    @property
    def counts(self) -> dict[str, Tensor]:
        """Pairs of this rank that have a metric, [] each, for metrics that not all have."""
        return dict(self._counts)

    def recorded(self) -> dict[str, Any]:
        """The sums since the last call of `means`, as JSON types, for `restore`."""
        sums, counts = (
            {name: total.item() for name, total in totals.items()}
            for totals in (self._sums, self._counts)
        )
        return {"sums": sums, "counts": counts, "num_pairs": self._num_pairs}

    def restore(self, recorded: dict[str, Any]) -> None:
        """Go on from sums that `recorded` returned, bit for bit."""
        self._sums, self._counts = (
            {name: torch.tensor(total, dtype=torch.float64) for name, total in totals.items()}
            # Early versions had no metrics of some pairs only.
            for totals in (recorded["sums"], recorded.get("counts", {}))
        )
        self._num_pairs = recorded["num_pairs"]

    def means(self, sum_over_ranks: SumOverRanks, device: torch.device) -> dict[str, float]:
        """Means over the pairs of all ranks since the last call; {} if no rank had any.

        A metric that not all pairs have is the mean over those that have it, and is left out if
        there is none.

        Every rank must call this together, and must have called `add` with the same names, even if
        it has no pairs: the ranks add up vectors of the same length.

        Args:
            sum_over_ranks: adds up a float64 vector over the ranks.
            device: device that `sum_over_ranks` expects the vector on.
        """
        if not self._sums:
            return {}
        # The same order on all ranks.
        names, counted = sorted(self._sums), sorted(self._counts)
        values = [*(self._sums[name] for name in names), *(self._counts[name] for name in counted)]
        count = torch.tensor(float(self._num_pairs), dtype=torch.float64, device=device)
        vector = torch.stack([*(value.to(device) for value in values), count])
        *totals, num_pairs = sum_over_ranks(vector).tolist()
        self._sums, self._counts, self._num_pairs = {}, {}, 0
        pairs_of = dict.fromkeys(names, num_pairs)
        pairs_of |= dict(zip(counted, totals[len(names) :], strict=True))
        sums = zip(names, totals[: len(names)], strict=True)
        return {name: total / pairs_of[name] for name, total in sums if pairs_of[name]}


def _add_to(totals: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add the sum of each value to the total of its name."""
    for name, value in values.items():
        total = value.detach().double().sum()
        totals[name] = totals[name] + total if name in totals else total
