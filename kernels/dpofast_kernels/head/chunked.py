"""Log-probs and gradients of one head, a chunk of rows at a time; never a tensor [N, V]."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpofast_kernels.head.chunks import max_chunk_rows, row_chunks
from dpofast_kernels.head.matmul import (
    accumulate_dtype,
    add_weight_grad,
    hidden_grad_into,
    vocab_blocks,
    weight_grad_into,
)
from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.rows import RowOps, ScoredRows
from dpofast_kernels.head.tiled import TorchRows
from dpofast_kernels.head.workspace import Workspace


@dataclass(frozen=True)
class Wanted:
    """Which gradients are."""

    hidden_states: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden_states or self.weight or self.bias


@dataclass(eq=False)
class Gradients:
    """Gradients under way, fp32 (fp64 for fp64 inputs); None where none is wanted.

    Attributes:
        hidden_states: [N, H].
        weight: [V, H].
        bias: [V].
        is_empty: whether nothing was added yet; the memory of `weight` is nobody's then.
    """

    hidden_states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    is_empty: bool

    def add_pair(self, own: Gradients, rows: slice, factor: Tensor) -> None:
        """Add those of one pair times a factor.

        Args:
            own: the pair's; its hidden states' stand in `rows` of this one's. Or this one itself,
                where nothing else was added.
            rows: of the pair.
            factor: [].
        """
        if self.hidden_states is not None:
            self.hidden_states[rows].mul_(factor)
        for name in ("weight", "bias"):
            total, of_pair = getattr(self, name), getattr(own, name)
            if total is None:
                continue
            if total is of_pair:
                total.mul_(factor)
            else:
                total.addcmul_(of_pair, factor)

    def fill_empty(self) -> None:
        """Zeros where no row has left a gradient."""
        if self.weight is not None and self.is_empty:
            self.weight.zero_()
            self.is_empty = False


class ChunkedHead:
    """A head and its inputs, cast to the dtype that it computes in.

    Args:
        hidden_states: [N, H].
        weight: [V, H].
        labels: [N].
        options: with a bias [V] or None.
        dtype: to compute in.
        backend: "torch", "triton" or "triton_fused".
        keep: whether gradients will be asked for.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        labels: Tensor,
        options: HeadOptions,
        dtype: torch.dtype,
        backend: str,
        keep: bool,
    ) -> None:
        self.hidden_states, self.weight = hidden_states.to(dtype), weight.to(dtype)
        self.labels, self.keep = labels, keep
        self.dtype = accumulate_dtype(dtype)  # of logits and gradients
        if options.bias is not None:
            # rounded as the other inputs are, then added in the logits' own dtype
            options = replace(options, bias=options.bias.to(dtype).to(self.dtype))
        self._ops = _row_ops(backend, self.weight, options)
        self.pair_loss = self._ops.pair_loss
        self._workspace_dtype = self._ops.workspace_dtype(keep)
        self._vocab_major = isinstance(self._ops, TorchRows) and weight.device.type == "cpu"
        self.max_rows = max_chunk_rows(
            self.weight, self._workspace_dtype, options.workspace_bytes, self._vocab_major
        )
        self._workspace: Workspace | None = None
        self._pair_gradients: Gradients | None = None

    def row_chunks(self, start: int, end: int) -> list[slice]:
        return list(row_chunks(start, end, self.max_rows))

    def score(self, rows: slice, keep: bool | None = None) -> ScoredRows:
        """Of at most `max_rows` rows; the next call reuses its memory.

        Args:
            rows: start and end.
            keep: False where these rows need no gradients although others will.
        """
        keep = self.keep if keep is None else keep
        if self._workspace is None and self._workspace_dtype is not None:
            capacity = min(len(self.labels), self.max_rows)
            # Triton's interpreter would copy all memory behind a tensor that it is given, so it
            # gets none that is kept.
            self._workspace = Workspace(
                self.weight, capacity, self._workspace_dtype, self._vocab_major
            )
        num_rows = rows.stop - rows.start
        logits = None if self._workspace is None else self._workspace.logits(num_rows)
        return self._ops.score(self.hidden_states[rows], self.labels[rows], logits, keep)

    def new_gradients(self, wanted: Wanted, weight_grad: Tensor | None = None) -> Gradients:
        """Gradients to add to; the weight's is `weight_grad` where one is given.

        The rows of hidden_states' gradient are set by `add_gradients`, each row once.
        """
        is_empty = weight_grad is None
        if weight_grad is None and wanted.weight:
            # Zeroing this much memory takes longer than it looks: the first rows are written to it.
            weight_grad = torch.empty_like(self.weight, dtype=self.dtype)
        return Gradients(
            torch.empty_like(self.hidden_states, dtype=self.dtype)
            if wanted.hidden_states
            else None,
            weight_grad if wanted.weight else None,
            self.weight.new_zeros(len(self.weight), dtype=self.dtype) if wanted.bias else None,
            is_empty,
        )

    def gradients_of_one_pair(self, gradients: Gradients) -> Gradients:
        """Where to add a pair's gradients before its factor is known; see `Gradients.add_pair`.

        `gradients` themselves while they are empty, else others with memory of their own for what
        sums over pairs: the next call reuses that.
        """
        if gradients.is_empty:
            return gradients
        own = self._pair_gradients
        if own is None:
            wanted = Wanted(False, gradients.weight is not None, gradients.bias is not None)
            own = self._pair_gradients = self.new_gradients(wanted)
            own.hidden_states = gradients.hidden_states
        own.is_empty = True
        if own.bias is not None:
            own.bias.zero_()
        return own

    def add_gradients(
        self,
        gradients: Gradients,
        rows: slice,
        scored: ScoredRows,
        coefficients: Tensor,  # [n]
    ) -> None:
        """Add those of sum(coefficients * per_token_logps) over `rows`.

        What `scored` kept is used up.
        """
        labels = self.labels[rows]
        made = self._ops.differentiate(scored, labels, coefficients.to(self.dtype))
        d_logits, factors = made.d_logits, made.factors  # [n, V], [n]
        if gradients.hidden_states is not None:
            out = hidden_grad_into(gradients.hidden_states[rows], d_logits, self.weight)  # [n, H]
            if factors is not None:
                out.mul_(factors[:, None])
        if gradients.weight is not None:
            hidden_states = self.hidden_states[rows]  # [n, H]
            if factors is not None:
                hidden_states = hidden_states * factors[:, None]
            hidden_states = hidden_states.to(d_logits.dtype)
            if gradients.is_empty:
                weight_grad_into(gradients.weight, d_logits, hidden_states)
            else:
                add_weight_grad(gradients.weight, d_logits, hidden_states)
        if gradients.bias is not None:
            if factors is None:
                factors = d_logits.new_ones(len(d_logits), dtype=self.dtype)
            for block in vocab_blocks(self.weight):  # upcast, a copy of all would be large
                gradients.bias[block].addmv_(d_logits[:, block].t().to(self.dtype), factors)
        gradients.is_empty = False


def _row_ops(backend: str, weight: Tensor, options: HeadOptions) -> RowOps:
    # Triton's are imported here, as Triton exists on Linux alone.
    if backend == "triton":
        from dpofast_kernels.head.rows_triton import TritonRows

        return TritonRows(weight, options)
    if backend == "triton_fused":
        from dpofast_kernels.head.fused_triton import FusedRows

        return FusedRows(weight, options)
    return TorchRows(weight, options)
