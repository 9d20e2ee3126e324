"""The row operations in plain PyTorch, for CPUs and any other device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpofast_kernels.head.matmul import accumulate_dtype, logits_into, product_dtype
from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.rows import LogitGradients, PairTerms, ScoredRows
from dpofast_kernels.head.sequences import segment_sums
from dpofast_kernels.preference import PairLoss, pair_metrics

# Rows are taken a few at a time, so that the passes over them find them in the cache.
CPU_CACHE_BYTES = 4 * 2**20


class TorchRows:
    """`RowOps` of PyTorch operations.

    In place, logits become E = exp(z - max), with the label's entry left out of their sum R. Then
    log p = -softplus(log R + max - z_label), which loses nothing where p is close to 1, and the
    gradient by z is -(E - S onehot) / S, S the sum with the label's entry. There E - S is -R.
    """

    def __init__(self, weight: Tensor, options: HeadOptions) -> None:
        self.weight = weight
        self.bias, self.softcap = options.bias, options.softcap
        self.scale = options.logit_scale / options.temperature
        self.temperature = options.temperature

    def workspace_dtype(self, keep: bool) -> torch.dtype:
        return accumulate_dtype(self.weight.dtype)

    def score(
        self, hidden_states: Tensor, labels: Tensor, workspace: Tensor | None, keep: bool
    ) -> ScoredRows:
        assert workspace is not None
        logits = logits_into(workspace, hidden_states, self.weight)  # [n, V]
        num_rows, dtype = len(labels), logits.dtype
        targets = labels[:, None]  # [n, 1]
        target_logits, row_max, rest = logits.new_empty(3, num_rows, 1).unbind()
        for rows in _cache_blocks(logits):
            z = self._finish_logits(logits[rows])
            torch.amax(z, -1, keepdim=True, out=row_max[rows])
            target_logits[rows] = z.gather(-1, targets[rows])
            slopes = self._cap_slopes(z) if keep and self.softcap else None
            z.sub_(row_max[rows]).exp_().scatter_(-1, targets[rows], 0.0)
            torch.sum(z, -1, keepdim=True, out=rest[rows])
            if keep:
                z.scatter_(-1, targets[rows], -rest[rows])
                if slopes is not None:
                    z.mul_(slopes)
        gaps = row_max.double() - target_logits
        logps = -torch.logaddexp(gaps.new_zeros(()), rest.double().log() + gaps)
        per_token_logps = logps[:, 0].to(dtype)
        if not keep:
            logsumexps = (target_logits - logps)[:, 0].to(dtype)
            return ScoredRows(per_token_logps, logsumexps=logsumexps)
        factors = -self.scale / (rest + gaps.neg().exp())
        return ScoredRows(per_token_logps, (logits, factors[:, 0].to(dtype)))

    def differentiate(
        self, scored: ScoredRows, labels: Tensor, coefficients: Tensor
    ) -> LogitGradients:
        logits, factors = scored.kept
        factors = coefficients * factors  # [n]
        dtype = product_dtype(self.weight)
        if dtype == logits.dtype:
            return LogitGradients(logits, factors)
        return LogitGradients(logits.mul_(factors[:, None]).to(dtype), None)

    def pair_loss(
        self, per_token_logps: Tensor, bounds: Tensor, ref_logps: Tensor, loss: PairLoss
    ) -> PairTerms:
        logps = segment_sums(per_token_logps, bounds)  # [2P]
        logratios = logps - ref_logps
        lengths = bounds.diff().view(-1, 2)  # [P, 2]
        losses, *slopes = loss.pair_loss(logratios[0::2], logratios[1::2], lengths)
        metrics = pair_metrics(logps, ref_logps, bounds, loss.beta)
        return PairTerms(
            losses, logps, torch.stack(slopes, 1).flatten(), torch.stack([*metrics.values()])
        )

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

    def _cap_slopes(self, z: Tensor) -> Tensor:
        """The derivative of tanh at each finished logit."""
        assert self.softcap is not None
        return 1.0 - (z * (self.temperature / self.softcap)).square()


def _cache_blocks(logits: Tensor) -> Iterator[slice]:
    num_rows = len(logits)
    size = max(num_rows, 1)
    if logits.device.type == "cpu":
        size = max(1, CPU_CACHE_BYTES // max(logits.shape[1] * logits.element_size(), 1))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
