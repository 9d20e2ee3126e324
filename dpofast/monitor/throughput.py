"""The speed of a run: pairs and tokens per second, and the share of the device's peak."""

from __future__ import annotations

import math
import time

import torch
from torch import nn

from dpofast.data.packing.batch import PackedPairs
from dpofast.model.flops import TrainingFlops, peak_flops
from dpofast.monitor.guard import ReportGuard
from dpofast.monitor.metrics import SumOverRanks

# `tokens` counts every sequence in full, so a shared prefix counts twice. `body_tokens` counts the
# positions that the body ran over, padding included.
COUNTED = ("pairs", "micro_batches", "tokens", "body_tokens", "scored_tokens", "flops")

FLOPS_REPORT = "mfu: counting the operations of the model"


class Throughput:
    """Counts the work of training steps between two logs, and the time that it took.

    Time runs from the first step after a log to the next log. Evaluations and checkpoints, which
    come between a log and the next step, don't count.

    Args:
        model: the policy, before anything shards its parameters.
        dtype: dtype that the forward pass computes in.
        device: this rank's device.
        world_size: number of ranks, each with such a device.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, device: torch.device, world_size: int
    ) -> None:
        self._guard = ReportGuard()
        self._peak = peak_flops(device, dtype)
        self._flops: TrainingFlops | None = None
        if self._peak is not None:  # without a peak there is nothing to compare them with
            with self._guard(FLOPS_REPORT):
                self._flops = TrainingFlops(model)
        self._device, self._world_size = device, world_size
        self._started: float | None = None
        self._counts = dict.fromkeys(COUNTED, 0.0)  # this rank, since the last log
        # What an earlier process has counted since the last log: part of means, not of speeds.
        self._carried = dict.fromkeys(COUNTED, 0.0)
        self._totals = dict.fromkeys((*COUNTED, "seconds"), 0.0)  # all ranks, the whole run

    def start_step(self) -> None:
        """Starts the clock at the first step after a log."""
        if self._started is None:
            self._started = time.perf_counter()

    def add(self, batch: PackedPairs) -> None:
        """Counts a micro-batch by its sizes only: reading its tensors would wait for the device."""
        numbers = (
            batch.num_pairs,
            1,
            batch.num_tokens,
            batch.num_body_tokens,
            int(batch.lengths.sum()),  # on the CPU; an answer counts in each of its pairs
            self._flops_of(batch),
        )
        for name, number in zip(COUNTED, numbers, strict=True):
            self._counts[name] += number

    def _flops_of(self, batch: PackedPairs) -> float:
        """Operations of a micro-batch; NaN if they aren't known, which sums over ranks keep."""
        if self._flops is not None:
            with self._guard(FLOPS_REPORT):
                return self._flops.of(batch)
        return math.nan

    def metrics(self, sum_over_ranks: SumOverRanks) -> dict[str, float]:
        """Figures of all ranks since the last call; {} if nothing was trained.

        Every rank must call this together, and only after it has waited for the results of its
        steps: a GPU may still be at work when a step returns.

        Args:
            sum_over_ranks: adds up a float64 tensor over the ranks.
        """
        own = [[*self._counts.values()], [*self._carried.values()]]
        sums = sum_over_ranks(torch.tensor(own, dtype=torch.float64, device=self._device))
        counts, carried = (dict(zip(COUNTED, row, strict=True)) for row in sums.tolist())
        started, self._started = self._started, None
        self._counts = dict.fromkeys(COUNTED, 0.0)
        self._carried = dict.fromkeys(COUNTED, 0.0)
        if started is None or not counts["pairs"]:
            return {}
        seconds = time.perf_counter() - started
        for name, value in {**counts, "seconds": seconds}.items():
            self._totals[name] += value
        whole = {name: counts[name] + carried[name] for name in COUNTED}
        return {
            **self._rates(counts, seconds),
            "lengths/pair": whole["tokens"] / whole["pairs"],
            "lengths/scored": whole["scored_tokens"] / whole["pairs"],
            "lengths/row": whole["body_tokens"] / whole["micro_batches"],
        }

    def recorded(self) -> dict[str, float]:
        """What this rank has counted since the last log, for `restore`."""
        return {
            name: self._counts[name] + self._carried[name] for name in COUNTED if name != "flops"
        }

    def restore(self, recorded: dict[str, float]) -> None:
        """Let the next log's means, but not its speeds, cover counts that `recorded` returned."""
        self._carried = {**dict.fromkeys(COUNTED, 0.0), **recorded}

    def summary(self) -> dict[str, float]:
        """Rates over the whole run so far, by the names of `metrics`; {} if nothing was trained."""
        seconds = self._totals["seconds"]
        return self._rates(self._totals, seconds) if seconds else {}

    def _rates(self, counts: dict[str, float], seconds: float) -> dict[str, float]:
        rates = {f"{name}_per_second": counts[name] / seconds for name in ("pairs", "tokens")}
        # model FLOPs utilisation, as a share of the device's peak
        if self._peak is not None and not math.isnan(counts["flops"]):
            rates["mfu"] = counts["flops"] / seconds / self._world_size / self._peak
        return rates
