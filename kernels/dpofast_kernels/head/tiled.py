"""The row operations in plain PyTorch, for CPUs and any other device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.rows import PairTerms, ScoredRows
from dpofast_kernels.head.sequences import segment_sums
from dpofast_kernels.preference import PairLoss

# Rows are taken a few at a time, so that the passes over them find them in the cache.
CPU_CACHE_BYTES = 4 * 2**20


class TorchRows:
    """`RowOps` of PyTorch operations.

    The logits become E = exp(z - max) in place. With S the sum of a row's E, the gradient of a
    log-prob by z is onehot - E / S = -(E - S onehot) / S: one scatter, and -1 / S goes to the
    factors. Under a softcap z is kept and E made again, as the cap's derivative needs z.
    """

    def __init__(self, options: HeadOptions, product_dtype: torch.dtype) -> None:
        self.bias, self.softcap = options.bias, options.softcap
        self.scale = options.logit_scale / options.temperature
        self.temperature = options.temperature
        self.product_dtype = product_dtype

    def score(self, logits: Tensor, labels: Tensor) -> ScoredRows:
        targets = labels[:, None]  # [n, 1]
        target_logits = logits.new_empty(len(logits), 1)
        row_max, sums = torch.empty_like(target_logits), torch.empty_like(target_logits)
        for rows in _cache_blocks(logits):
            z = self._finish_logits(logits[rows])
            torch.amax(z, -1, keepdim=True, out=row_max[rows])
            target_logits[rows] = z.gather(-1, targets[rows])
            shifted = z - row_max[rows] if self.softcap else z.sub_(row_max[rows])
            torch.sum(shifted.exp_(), -1, keepdim=True, out=sums[rows])
        per_token_logps = target_logits.double() - row_max - sums.double().log()
        return ScoredRows(
            per_token_logps[:, 0].to(logits.dtype), logits, labels, row_max[:, 0], sums[:, 0]
        )

    def d_logits(self, scored: ScoredRows, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        d_logits, targets = scored.logits, scored.labels[:, None]
        row_max, sums = scored.row_max[:, None], scored.sums[:, None]
        if self.softcap is None:
            d_logits.scatter_add_(-1, targets, -sums)
        else:
            for rows in _cache_blocks(d_logits):
                z = d_logits[rows]
                cap_slopes = 1.0 - (z * (self.temperature / self.softcap)).square()
                z.sub_(row_max[rows]).exp_().scatter_add_(-1, targets[rows], -sums[rows])
                z.mul_(cap_slopes)
        factors = coefficients * (-self.scale / scored.sums)
        return d_logits.to(self.product_dtype), factors

    def pair_loss(
        self, per_token_logps: Tensor, bounds: Tensor, ref_logps: Tensor, loss: PairLoss
    ) -> PairTerms:
        logps = segment_sums(per_token_logps, bounds)  # [2P]
        logratios = logps - ref_logps
        lengths = bounds.diff().view(-1, 2)  # [P, 2]
        losses, *slopes = loss.pair_loss(logratios[0::2], logratios[1::2], lengths)
        return PairTerms(losses, logps, torch.stack(slopes, 1).flatten())

    def _finish_logits(self, z: Tensor) -> Tensor:
        """Bias, scale, cap and temperature, in place."""
        if self.bias is not None:
            z.add_(self.bias)
        if self.softcap is not None:
            z.mul_(self.scale * self.temperature / self.softcap).tanh_()
            z.mul_(self.softcap / self.temperature)
        elif self.scale != 1.0:
            z.mul_(self.scale)
        return z


def _cache_blocks(logits: Tensor) -> Iterator[slice]:
    num_rows = len(logits)
    size = max(num_rows, 1)
    if logits.device.type == "cpu":
        size = max(1, CPU_CACHE_BYTES // max(logits.shape[1] * logits.element_size(), 1))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
