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
from dpofast_kernels.head.dtypes import accumulate_dtype
from dpofast_kernels.head.matmul import (
    add_weight_grad,
    hidden_grad_into,
    vocab_blocks,
    weight_grad_into,
)
from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.rows import ScoredRows
from dpofast_kernels.head.workspace import Workspace, max_chunk_rows, row_chunks


@dataclass(frozen=True)
class Wanted:
    """Which inputs need a gradient."""

    hidden_states: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden_states or self.weight or self.bias


@dataclass(eq=False)
class Gradients:
    """Sums of gradients, fp32 (fp64 for fp64 inputs); None for an input that needs none.

    Attributes:
        hidden_states: [N, H].
        weight: [V, H].
        bias: [V].
        is_empty: True until something is added; `weight` is uninitialised memory until then. False
            from the start if `weight` is a caller's buffer, whose contents count.
    """

    hidden_states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    is_empty: bool

    def add_own(self, own: Gradients, rows: slice, factor: Tensor) -> None:
        """Add the gradients of some rows times a factor.

        Args:
            own: gradients of the rows, from `ChunkedHead.own_gradients`. Its `hidden_states` is the
                tensor of this object. If nothing else was added before them, `own` is this object
                itself; then it comes first.
            rows: the rows.
            factor: [].
        """
        if self.hidden_states is not None:
            self.hidden_states[rows].mul_(factor)
        for name in ("weight", "bias"):
            total, of_rows = getattr(self, name), getattr(own, name)
            if total is None:
                continue
            if total is of_rows:
                total.mul_(factor)
            else:
                total.addcmul_(of_rows, factor)

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
        keep: whether gradients will be asked for.
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
        keep: bool,
        statistics: tuple[str, ...] = (),
    ) -> None:
        self.hidden_states, self.weight = hidden_states.to(dtype), weight.to(dtype)
        self.labels, self.keep = labels, keep
        self.dtype = accumulate_dtype(dtype)  # dtype of logits and gradients
        if options.bias is not None:
            # The bias is rounded to the compute dtype like the other inputs. Then it is upcast,
            # because it is added to fp32 (or fp64) logits.
            options = replace(options, bias=options.bias.to(dtype).to(self.dtype))
        self.ops = row_ops(backend, self.weight, options, statistics)
        self._workspace_dtype = self.ops.workspace_dtype(keep)
        self.max_rows = max_chunk_rows(
            self.weight, self._workspace_dtype, options.workspace_bytes, self.ops.vocab_major
        )
        self._workspace: Workspace | None = None
        self._own_gradients: dict[int, Gradients] = {}

    def row_chunks(self, start: int, end: int) -> list[slice]:
        return list(row_chunks(start, end, self.max_rows))

    def score(self, rows: slice, keep: bool | None = None) -> ScoredRows:
        """Log-probs of at most `max_rows` rows; the next call reuses their memory.

        Args:
            rows: start and end.
            keep: False if these rows need no gradient although other rows do; None means the
                `keep` of the head.
        """
        keep = self.keep if keep is None else keep
        if self._workspace is None and self._workspace_dtype is not None:
            capacity = min(len(self.labels), self.max_rows)
            self._workspace = Workspace(
                self.weight, capacity, self._workspace_dtype, self.ops.vocab_major
            )
        num_rows = rows.stop - rows.start
        logits = None if self._workspace is None else self._workspace.logits(num_rows)
        return self.ops.score(self.hidden_states[rows], self.labels[rows], logits, keep)

    def new_gradients(self, wanted: Wanted, weight_grad: Tensor | None = None) -> Gradients:
        """New gradients, to which nothing is added yet.

        The gradient of the hidden states is uninitialised: `add_gradients` sets each row of it
        once.

        Args:
            wanted: which gradients to make.
            weight_grad: [V, H], a caller's buffer that the weight's gradient is added to; None
                allocates memory for it.
        """
        is_empty = weight_grad is None
        if weight_grad is None and wanted.weight:
            # Zeroing this much memory would cost a pass over it. The first chunk overwrites it
            # instead.
            weight_grad = torch.empty_like(self.weight, dtype=self.dtype)
        return Gradients(
            torch.empty_like(self.hidden_states, dtype=self.dtype)
            if wanted.hidden_states
            else None,
            weight_grad if wanted.weight else None,
            self.weight.new_zeros(len(self.weight), dtype=self.dtype) if wanted.bias else None,
            is_empty,
        )

    def own_gradients(self, gradients: Gradients, index: int) -> Gradients:
        """The gradients that some rows are summed in until `Gradients.add_own` gets their factor.

        While `gradients` is empty, the result is `gradients` itself. Otherwise the weight and bias
        gradients get separate memory, because the factor must not multiply what other rows have
        added. The next call with the same index uses that memory again.

        Args:
            gradients: the gradients of the call.
            index: number of this sum among those that wait for their factors.
        """
        if gradients.is_empty:
            return gradients
        if index not in self._own_gradients:
            wanted = Wanted(False, gradients.weight is not None, gradients.bias is not None)
            own = self._own_gradients[index] = self.new_gradients(wanted)
            # Nothing else adds to these rows, so they can share the tensor.
            own.hidden_states = gradients.hidden_states
        own = self._own_gradients[index]
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
