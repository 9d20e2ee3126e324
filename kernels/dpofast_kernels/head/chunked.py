"""Log-probs and gradients of one head, a chunk of rows at a time, without a tensor [N, V].

For each chunk, a caller first calls `score`, which makes the chunk's logits in the workspace and
turns them into log-probs. Then it calls `add_gradients` with one coefficient per row, the
derivative of the loss with respect to the row's log-prob. That turns the workspace into d_logits,
the gradient of the logits. d_logits times the weight gives the gradient of the hidden states, and
d_logits times the hidden states gives that of the weight. The next `score` overwrites the
workspace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpofast_kernels.head.backends import row_ops
from dpofast_kernels.head.cast import scale_and_cast
from dpofast_kernels.head.dtypes import accumulate_dtype
from dpofast_kernels.head.matmul import (
    add_weight_grad,
    hidden_grad_into,
    vocab_blocks,
    weight_grad_into,
)
from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.rows import ScoredRows
from dpofast_kernels.head.workspace import (
    WeightGrad,
    Workspace,
    chunk_limits,
    row_chunks,
    rows_to_allocate,
)


@dataclass(frozen=True)
class Wanted:
    """Which inputs need a gradient.

    Attributes:
        hidden_states, weight, bias: whether this input needs one.
        rounded: whether the weight's gradient may be rounded to the weight's dtype as soon as it is
            made, because the upstream gradient is part of the coefficients. That happens if a
            single chunk makes it.
    """

    hidden_states: bool
    weight: bool
    bias: bool
    rounded: bool = False

    def __bool__(self) -> bool:
        return self.hidden_states or self.weight or self.bias

    def weight_grad(self) -> WeightGrad:
        """How the weight's gradient is made in a call of one chunk."""
        if not self.weight:
            return WeightGrad.NONE
        return WeightGrad.ROUNDED if self.rounded else WeightGrad.SUMMED


NOTHING = Wanted(False, False, False)


@dataclass(eq=False)
class Gradients:
    """Sums of gradients, fp32 (fp64 for fp64 inputs); None for an input that needs none.

    Attributes:
        hidden_states: [N, H].
        weight: [V, H]; in the weight's dtype if one chunk makes it and it may be rounded.
        bias: [V].
        is_empty: True until something is added; `weight` is uninitialised memory until then. False
            from the start if `weight` is a caller's buffer, whose contents count.
    """

    hidden_states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    is_empty: bool

    def scale(self, rows: slice, factor: Tensor, backend: str) -> None:
        """Multiply by a factor [], if nothing but the gradients of `rows` was added so far."""
        of_rows = None if self.hidden_states is None else self.hidden_states[rows]
        for total in (of_rows, self.weight, self.bias):
            if total is not None:
                scale_and_cast(total, factor, total, backend)

    def fill_empty(self) -> None:
        """Make the weight's gradient zero if no row was added to it."""
        if self.weight is not None and self.is_empty:
            self.weight.zero_()
            self.is_empty = False


class ChunkedHead:
    """A head and its inputs, cast to the dtype to compute in.

    Args:
        hidden_states: [N, H].
        weight: [V, H].
        labels: [N].
        options: options of the op, with a bias [V] or None.
        dtype: dtype to compute in.
        backend: "torch", "triton" or "triton_fused".
        wanted: which gradients will be asked for.
        statistics: names of the statistics that `score` computes, see `STATISTICS`.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        labels: Tensor,
        options: HeadOptions,
        dtype: torch.dtype,
        backend: str,
        wanted: Wanted,
        statistics: tuple[str, ...] = (),
    ) -> None:
        self.hidden_states, self.weight = hidden_states.to(dtype), weight.to(dtype)
        self.labels, self.wanted = labels, wanted
        self.dtype = accumulate_dtype(dtype)  # dtype of logits and gradients
        if options.bias is not None:
            # The bias is rounded to the compute dtype like the other inputs. Then it is upcast,
            # because it is added to fp32 (or fp64) logits.
            options = replace(options, bias=options.bias.to(dtype).to(self.dtype))
        self.backend = backend
        self.ops = row_ops(backend, self.weight, options, statistics)
        self._workspace_dtype = self.ops.workspace_dtype(bool(wanted))
        vocab_size, hidden_size = weight.shape
        self.limits = chunk_limits(
            *(len(labels), (vocab_size, hidden_size), dtype, self._workspace_dtype),
            *(weight.device.type, options.workspace_bytes, self.ops.vocab_major),
            wanted.weight_grad(),
        )
        self._workspace: Workspace | None = None
        self._largest = 0

    def expect(self, chunk_rows: list[int]) -> None:
        """Say how many rows chunks will have, so that the first one allocates for all of them."""
        self._largest = max((rows for rows in chunk_rows if rows <= self.limits.most), default=0)

    def row_chunks(self, start: int, end: int) -> list[slice]:
        return list(row_chunks(start, end, self.limits.wanted))

    def score(self, rows: slice, keep: bool | None = None) -> ScoredRows:
        """Log-probs of at most `limits.most` rows; the next call reuses their memory.

        Args:
            rows: start and end.
            keep: False if these rows need no gradient although other rows do; None means that they
                do if any gradient is wanted.
        """
        keep = bool(self.wanted) if keep is None else keep
        num_rows = rows.stop - rows.start
        return self.ops.score(
            self.hidden_states[rows], self.labels[rows], self._logits(num_rows), keep
        )

    def _logits(self, num_rows: int) -> Tensor | None:
        """Memory for a chunk's logits; None if the back end needs none."""
        if self._workspace_dtype is None:
            return None
        if self._workspace is None or self._workspace.num_rows < num_rows:
            capacity = max(num_rows, self._largest)
            if self.weight.device.type != "cpu":
                capacity = rows_to_allocate(capacity, self.limits)
            self._workspace = None  # a smaller one is freed first
            self._workspace = Workspace(
                self.weight, capacity, self._workspace_dtype, self.ops.vocab_major
            )
        return self._workspace.logits(num_rows)

    def new_gradients(self, weight_grad: Tensor | None = None) -> Gradients:
        """New gradients, to which nothing is added yet.

        The gradient of the hidden states is uninitialised: `add_gradients` sets each row of it
        once.

        Args:
            weight_grad: [V, H], a caller's buffer that the weight's gradient is added to; None
                allocates memory for it.
        """
        is_empty, wanted = weight_grad is None, self.wanted
        if weight_grad is None and wanted.weight:
            # Zeroing this much memory would cost a pass over it. The first chunk overwrites it
            # instead.
            is_rounded = wanted.rounded and len(self.labels) <= self.limits.wanted
            dtype = self.weight.dtype if is_rounded else self.dtype
            weight_grad = torch.empty_like(self.weight, dtype=dtype)
        return Gradients(
            torch.empty_like(self.hidden_states, dtype=self.dtype)
            if wanted.hidden_states
            else None,
            weight_grad if wanted.weight else None,
            self.weight.new_zeros(len(self.weight), dtype=self.dtype) if wanted.bias else None,
            is_empty,
        )

    def add_gradients(
        self,
        gradients: Gradients,
        rows: slice,
        scored: ScoredRows,
        coefficients: Tensor,  # [n]
    ) -> None:
        """Add the gradients of sum(coefficients * per_token_logps) over `rows`.

        `scored` can't be used again afterwards: its tensors may have been overwritten.
        """
        labels = self.labels[rows]
        made = self.ops.differentiate(scored, labels, coefficients.to(self.dtype))
        d_logits, factors = made.d_logits, made.factors  # [n, V], [n]
        if gradients.hidden_states is not None:
            out = hidden_grad_into(gradients.hidden_states[rows], d_logits, self.weight)  # [n, H]
            if factors is not None:
                out.mul_(factors[:, None])
        if gradients.weight is not None:
            hidden_states = self.hidden_states[rows]  # [n, H]
            if factors is not None:
                # Scaling [n, H] is cheaper than scaling d_logits [n, V].
                hidden_states = hidden_states * factors[:, None]
            hidden_states = hidden_states.to(d_logits.dtype)
            if gradients.is_empty:
                weight_grad_into(gradients.weight, d_logits, hidden_states)
            else:
                add_weight_grad(gradients.weight, d_logits, hidden_states)
        if gradients.bias is not None:
            if factors is None:
                factors = d_logits.new_ones(len(d_logits), dtype=self.dtype)
            # Block by block, because an upcast copy of all of d_logits would be large.
            for block in vocab_blocks(self.weight):
                gradients.bias[block].addmv_(d_logits[:, block].t().to(self.dtype), factors)
        gradients.is_empty = False
