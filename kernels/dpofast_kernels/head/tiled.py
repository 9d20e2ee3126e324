"""The back end in plain PyTorch, for CPUs and any other device."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.head.dtypes import accumulate_dtype, product_dtype
from dpofast_kernels.head.matmul import logits_into
from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.pairs import Pairs, PairTerms, SequenceTerms
from dpofast_kernels.head.rows import LogitGradients, ScoredRows
from dpofast_kernels.head.sequences import segment_sums
from dpofast_kernels.head.singles import Singles
from dpofast_kernels.head.statistics import RowStatistics

# A CPU works on this many columns of the logits at a time: the product is a little faster, and its
# result is still in the cache for the passes over it. The number is the same for all chunks: a
# row's log-prob should depend on the length of its chunk as little as possible.
CPU_COLUMNS = 2048
# On other devices, operations that need memory beside the logits take it for this many columns.
DEVICE_COLUMNS = 4096


class TorchRows:
    """`RowOps` made of PyTorch operations.

    Logits z become E = exp(z - max) in place. R is the sum of E without the label's entry, S the
    sum with it. Then

        log p        = -softplus(log R + max - z_label)
        d log p / dz = -(E - S onehot) / S

    The first line keeps its digits when p is close to 1, where log(E_label / S) would lose them.
    For the same reason the label's entry of the second line is written as -R, not as E - S.
    """

    def __init__(
        self, weight: Tensor, options: HeadOptions, statistics: tuple[str, ...] = ()
    ) -> None:
        self.weight, self.statistics = weight, statistics
        self.bias, self.softcap = options.bias, options.softcap
        self.scale = options.logit_scale / options.temperature
        self.temperature = options.temperature
        self.vocab_major = weight.device.type == "cpu"

    def workspace_dtype(self, keep: bool) -> torch.dtype:
        return accumulate_dtype(self.weight.dtype)

    def score(
        self, hidden_states: Tensor, labels: Tensor, workspace: Tensor | None, keep: bool
    ) -> ScoredRows:
        assert workspace is not None
        logits, targets = workspace[: len(labels)], labels[:, None]  # [n, V], [n, 1]
        padding = len(workspace) - len(labels)
        # On a CPU the workspace has a multiple of 16 rows. The product fills all of them, but
        # nothing reads the rows beyond the last label.
        hidden_states = F.pad(hidden_states, (0, 0, 0, padding))  # [m, H]
        # First pass: the logits, block by block, and the maximum of each row.
        row_max = logits.new_full(targets.shape, -math.inf)
        rest = torch.zeros_like(row_max, dtype=torch.float64)
        found = RowStatistics(self.statistics, rest.clone())
        for block in self._blocks():
            logits_into(workspace[:, block], hidden_states, self.weight[block])
            z = self._finish_logits(logits[:, block], block)
            found.add_logits(z)
            torch.maximum(row_max, z.amax(-1, keepdim=True), out=row_max)
        target_logits = logits.gather(-1, targets)
        logits.scatter_(-1, targets, -math.inf)  # exp turns it into 0: R excludes the label
        # Second pass: E in place of z, times the slope of the cap, and the sum R.
        for block in self._blocks():
            z = logits[:, block]
            # The slope is computed from the capped logit, which exp_ overwrites.
            slopes = self._cap_slopes(z) if keep and self.softcap else None
            # exp_ in place overwrites the differences. So they get their own memory if needed.
            differences = z - row_max if found.wants_differences else z.sub_(row_max)
            torch.exp(differences, out=z)
            rest += z.sum(-1, keepdim=True)
            found.add_exponentials(z, differences)
            if slopes is not None:
                z.mul_(slopes)
        gaps = row_max.double() - target_logits
        # softplus(x) = logaddexp(0, x)
        logps = -torch.logaddexp(gaps.new_zeros(()), rest.log() + gaps)
        per_token_logps = logps[:, 0].to(logits.dtype)
        statistics = found.finish(rest, gaps, len(self.weight), logits.dtype)
        if not keep:
            logsumexps = (row_max + (rest + gaps.neg().exp()).log())[:, 0].to(logits.dtype)
            return ScoredRows(per_token_logps, (), logsumexps, statistics)
        d_target = rest.neg().to(logits.dtype)  # E - S at the label is -R: no digits cancel
        if self.softcap:
            d_target *= self._cap_slopes(target_logits)
        logits.scatter_(-1, targets, d_target)
        factors = -self.scale / (rest + gaps.neg().exp())
        kept = (logits, factors[:, 0].to(logits.dtype))
        return ScoredRows(per_token_logps, kept, statistics=statistics)

    def differentiate(
        self, scored: ScoredRows, labels: Tensor, coefficients: Tensor
    ) -> LogitGradients:
        logits, factors = scored.kept
        factors = coefficients * factors  # [n]
        dtype = product_dtype(self.weight)
        if dtype == logits.dtype:
            return LogitGradients(logits, factors)  # saves a pass over the logits
        # With the factors multiplied in before the cast, d_logits is rounded to bf16 only once. It
        # overwrites the logits, because a second [n, V] would exceed the limit of the workspace. A
        # block of it ends before the columns that are still to be read begin.
        d_logits = logits.view(dtype)[:, : logits.shape[1]]
        for block in self._blocks():
            d_logits[:, block] = (logits[:, block] * factors[:, None]).to(dtype)
        return LogitGradients(d_logits, None)

    def pair_loss(self, per_token_logps: Tensor, pairs: Pairs) -> PairTerms:
        logps = segment_sums(per_token_logps, pairs.bounds)  # [S]
        losses, *slopes = pairs.pair_losses(logps)
        return PairTerms(losses, logps, torch.stack(slopes, 1), pairs.metrics(logps))

    def sequence_loss(self, per_token_logps: Tensor, singles: Singles) -> SequenceTerms:
        return singles.terms_in_torch(per_token_logps)

    def _blocks(self) -> Iterator[slice]:
        """Slices that cover the vocabulary."""
        step = CPU_COLUMNS if self.weight.device.type == "cpu" else DEVICE_COLUMNS
        for start in range(0, len(self.weight), step):
            yield slice(start, start + step)

    def _finish_logits(self, z: Tensor, block: slice) -> Tensor:
        """Apply bias, scale, cap and temperature in place."""
        if self.bias is not None:
            z.add_(self.bias[block])
        if self.softcap is not None:
            # scale * temperature is logit_scale: the temperature is applied after the cap.
            z.mul_(self.scale * self.temperature / self.softcap).tanh_()
            z.mul_(self.softcap / self.temperature)
        elif self.scale != 1.0:
            z.mul_(self.scale)
        return z

    def _cap_slopes(self, z: Tensor) -> Tensor:
        """1 - tanh^2, the derivative of the cap, from finished logits."""
        assert self.softcap is not None
        return 1.0 - (z * (self.temperature / self.softcap)).square()
