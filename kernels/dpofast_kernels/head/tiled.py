"""The row operations in plain PyTorch, for CPUs and any other device."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.head.matmul import accumulate_dtype, logits_into, product_dtype
from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.rows import LogitGradients, PairTerms, ScoredRows
from dpofast_kernels.head.sequences import segment_sums
from dpofast_kernels.preference import PairLoss, pair_metrics

# A CPU takes so much of the vocabulary at a time: products are a little faster so, and what they
# leave is in the cache for the passes over it. One number for all chunks, as a row is to depend on
# the length of its chunk as little as may be.
CPU_COLUMNS = 2048


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
        logits, targets = workspace[: len(labels)], labels[:, None]  # [n, V], [n, 1]
        padding = len(workspace) - len(labels)
        hidden_states = F.pad(hidden_states, (0, 0, 0, padding))  # [m, H]
        row_max = logits.new_full(targets.shape, -math.inf)
        for block in self._blocks():
            logits_into(workspace[:, block], hidden_states, self.weight[block])
            z = self._finish_logits(logits[:, block], block)
            torch.maximum(row_max, z.amax(-1, keepdim=True), out=row_max)
        target_logits = logits.gather(-1, targets)
        logits.scatter_(-1, targets, -math.inf)  # left out of the sum
        rest = torch.zeros_like(row_max, dtype=torch.float64)
        for block in self._blocks():
            z = logits[:, block]
            slopes = self._cap_slopes(z) if keep and self.softcap else None
            rest += z.sub_(row_max).exp_().sum(-1, keepdim=True)
            if slopes is not None:
                z.mul_(slopes)
        gaps = row_max.double() - target_logits
        logps = -torch.logaddexp(gaps.new_zeros(()), rest.log() + gaps)
        per_token_logps = logps[:, 0].to(logits.dtype)
        if not keep:
            logsumexps = row_max + (rest + gaps.neg().exp()).log()
            return ScoredRows(per_token_logps, logsumexps=logsumexps[:, 0].to(logits.dtype))
        d_target = rest.neg().to(logits.dtype)
        if self.softcap:
            d_target *= self._cap_slopes(target_logits)
        logits.scatter_(-1, targets, d_target)
        factors = -self.scale / (rest + gaps.neg().exp())
        return ScoredRows(per_token_logps, (logits, factors[:, 0].to(logits.dtype)))

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

    def _blocks(self) -> Iterator[slice]:
        """All of the vocabulary, on a CPU a part at a time."""
        vocab_size = len(self.weight)
        step = CPU_COLUMNS if self.weight.device.type == "cpu" else vocab_size
        for start in range(0, vocab_size, step):
            yield slice(start, start + step)

    def _finish_logits(self, z: Tensor, block: slice) -> Tensor:
        """Bias, scale, cap and temperature, in place."""
        if self.bias is not None:
            z.add_(self.bias[block])
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
