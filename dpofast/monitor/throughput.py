"""How fast a run trains: pairs and tokens a second, and the share of the device's peak."""

from __future__ import annotations

import time

import torch
from torch import nn

from dpofast.data.packing.batch import PackedPairs
from dpofast.model.flops import TrainingFlops, peak_flops
from dpofast.monitor.metrics import SumOverRanks

# What is counted: pairs and rows (micro-batches), tokens of the sequences each for itself, tokens
# that the body ran over, those that were scored, and floating-point operations.
COUNTED = ("pairs", "rows", "tokens", "row_tokens", "scored", "flops")


class Throughput:
    """Counts what training steps do between two logs.

    Time runs from the first step after a log to the next log, so that evaluations and checkpoints
    don't count.

    Args:
        model: the policy.
        dtype: in which it computes.
        device: it is on.
        world_size: ranks, each with such a device.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, device: torch.device, world_size: int
    ) -> None:
        self._flops = TrainingFlops(model)
        self._peak = peak_flops(device, dtype)
        self._device, self._world_size = device, world_size
        self._started: float | None = None
        self._counts = dict.fromkeys(COUNTED, 0.0)  # of this rank since the last log
        self._totals = dict.fromkeys((*COUNTED, "seconds"), 0.0)  # of all ranks

    def start_step(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def add(self, batch: PackedPairs) -> None:
        """Count a micro-batch; its tensors are not read."""
        numbers = (
            batch.num_pairs,
            1,
            batch.num_tokens,
            batch.num_body_tokens,
            len(batch.labels),
            self._flops.of(batch),
        )
        for name, number in zip(COUNTED, numbers, strict=True):
            self._counts[name] += number

    def metrics(self, sum_over_ranks: SumOverRanks) -> dict[str, float]:
        """Figures of all ranks since the last call; {} where nothing was trained.

        Every rank must call this, when the steps' results have been waited for.
        """
        own = torch.tensor([*self._counts.values()], dtype=torch.float64)
        counts = dict(zip(COUNTED, sum_over_ranks(own.to(self._device)).tolist(), strict=True))
        started, self._started = self._started, None
        self._counts = dict.fromkeys(COUNTED, 0.0)
        if started is None or not counts["pairs"]:
            return {}
        seconds = time.perf_counter() - started
        for name, value in {**counts, "seconds": seconds}.items():
            self._totals[name] += value
        return {
            **self._rates(counts, seconds),
            "lengths/pair": counts["tokens"] / counts["pairs"],
            "lengths/scored": counts["scored"] / counts["pairs"],
            "lengths/row": counts["row_tokens"] / counts["rows"],
        }

    def summary(self) -> dict[str, float]:
        """Rates over all of the run so far, by the same names; {} where nothing was trained."""
        seconds = self._totals["seconds"]
        return self._rates(self._totals, seconds) if seconds else {}

    def _rates(self, counts: dict[str, float], seconds: float) -> dict[str, float]:
        rates = {f"{name}_per_second": counts[name] / seconds for name in ("pairs", "tokens")}
        if self._peak is not None:
            rates["mfu"] = counts["flops"] / seconds / self._world_size / self._peak
        return rates
