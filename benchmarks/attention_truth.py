"""The right results for a row of the attention benchmark, and the rule that judges contenders.

A result is compared with that of the back end "naive" in fp64, one pair and one key head at a time.
Errors of up to MULTIPLE times those of plain PyTorch in the same dtype, plus FLOORS, are allowed.
The error is that of the worst pair in the row, so a mistake in a single pair shows, however long
the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.attention_cases import Inputs, Outputs
from benchmarks.attention_contenders import PADDING
from benchmarks.harness import Verdict
from dpofast_kernels.attention import (
    AttentionOptions,
    SharedLayout,
    attends,
    build_layout,
    shared_attention,
)

MULTIPLE = 3.0
# Part of each bound: relative Frobenius error within a pair.
FLOORS = {torch.float32: 5e-6, torch.bfloat16: 3e-3}
GRADIENTS = ("d_query", "d_key", "d_value")

Attention = Callable[[Tensor, Tensor, Tensor, SharedLayout, AttentionOptions], Tensor]


def find_truth(inputs: Inputs) -> Outputs:
    """Output and gradients of the shared row in fp64, from the back end "naive"."""
    return _by_parts(_naive, inputs, torch.float64)


def plain_in_dtype(inputs: Inputs) -> Outputs:
    """Output and gradients from eager attention in the inputs' dtype; its errors set the bounds."""
    return _by_parts(eager_attention, inputs, inputs.query.dtype)


def _naive(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedLayout, options: AttentionOptions
) -> Tensor:
    return shared_attention(query, key, value, layout, replace(options, backend="naive"))


def eager_attention(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [T, Hkv, D]
    value: Tensor,  # [T, Hkv, D]
    layout: SharedLayout,
    options: AttentionOptions,
) -> Tensor:
    """[T, Hq, D]: attention with a dense mask; products in the inputs' dtype, softmax in fp32."""
    repeats = query.shape[1] // key.shape[1]
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    scores = query @ key.transpose(1, 2) * options.scale_for(query.shape[-1])  # [Hq, T, T]
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~attends(layout, options.window), float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sinks], -1)
    probs = scores.softmax(-1, dtype=torch.float32)[..., : key.shape[1]]
    return (probs.to(value.dtype) @ value).transpose(0, 1)


def _by_parts(attention: Attention, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """Run `attention` and its backward for one pair and one key head at a time.

    Pairs and heads don't attend to each other, so this gives the same results as the whole row.
    The scores of the whole row would not fit in memory.
    """
    repeats = inputs.query.shape[1] // inputs.key.shape[1]
    found = {
        "output": torch.empty_like(inputs.d_output, dtype=dtype),
        "d_query": torch.empty_like(inputs.d_output, dtype=dtype),
        "d_key": torch.empty_like(inputs.key, dtype=dtype),
        "d_value": torch.empty_like(inputs.key, dtype=dtype),
    }
    sinks = inputs.sinks
    d_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=dtype)
    for rows, layout in _group_rows(inputs):
        for head in range(inputs.key.shape[1]):
            keys, queries = slice(head, head + 1), slice(head * repeats, (head + 1) * repeats)
            places = ((inputs.query, queries), (inputs.key, keys), (inputs.value, keys))
            query, key, value = (_leaf(states[rows, heads], dtype) for states, heads in places)
            own_sinks = None if sinks is None else _leaf(sinks[queries], dtype)
            leaves = [query, key, value, *([] if own_sinks is None else [own_sinks])]
            options = replace(inputs.options, sinks=own_sinks)
            output = attention(query, key, value, layout, options)
            upstream = inputs.d_output[rows, queries].to(dtype)
            gradients = torch.autograd.grad(output, leaves, upstream)
            found["output"][rows, queries] = output.detach()
            found["d_query"][rows, queries] = gradients[0]
            found["d_key"][rows, keys] = gradients[1]
            found["d_value"][rows, keys] = gradients[2]
            if d_sinks is not None:
                d_sinks[queries] += gradients[3]
    return Outputs(**found, d_sinks=d_sinks)


def _group_rows(inputs: Inputs) -> Iterator[tuple[slice, SharedLayout]]:
    start = 0
    for prefix, tails in inputs.groups:
        end = start + prefix + sum(tails)
        yield slice(start, end), build_layout([(prefix, tails)]).to(inputs.query.device)
        start = end


def _leaf(states: Tensor, dtype: torch.dtype) -> Tensor:
    return states.detach().to(dtype).requires_grad_()


class Judge:
    """Judges results by the truth and by the errors that plain PyTorch makes."""

    def __init__(self, inputs: Inputs) -> None:
        self.truth = find_truth(inputs)
        self.group_ids, dtype = inputs.layout.group_ids, inputs.query.dtype
        self.naive_errors = self.errors(plain_in_dtype(inputs))
        self.bounds = {
            name: MULTIPLE * error + FLOORS[dtype] for name, error in self.naive_errors.items()
        }

    def forward(self, outputs: Outputs) -> Verdict:
        """Judge only the output."""
        return self._verdict(outputs, ("output",))

    def forward_backward(self, outputs: Outputs) -> Verdict:
        """Judge the output and the gradients."""
        return self._verdict(outputs, tuple(self.naive_errors))

    def _verdict(self, outputs: Outputs, needed: tuple[str, ...]) -> Verdict:
        missing = [name for name in needed if getattr(outputs, name) is None]
        if missing:
            raise ValueError(f"the result lacks {', '.join(missing)}")
        errors = self.errors(outputs)
        return Verdict(errors, {name: self.bounds[name] for name in errors})

    def errors(self, outputs: Outputs) -> dict[str, float]:
        """Relative errors of all results that are given, each the largest among the row's pairs."""
        tokens = _tokens(outputs.query_tokens, self.group_ids)
        real = tokens != PADDING
        rows = tokens[real]
        given = outputs.output[real].double()
        found = {"output": self._largest(given, self.truth.output[rows], self.group_ids[rows])}
        for name in GRADIENTS:
            gradient, exact = getattr(outputs, name), getattr(self.truth, name)
            if gradient is not None:
                places = outputs.query_tokens if name == "d_query" else outputs.key_tokens
                tokens = _tokens(places, self.group_ids)
                real = tokens != PADDING
                total = torch.zeros_like(exact)
                total.index_add_(0, tokens[real], gradient[real].double())
                found[name] = self._largest(total, exact, self.group_ids)
        if outputs.d_sinks is not None and self.truth.d_sinks is not None:
            whole = torch.zeros(len(self.truth.d_sinks), dtype=torch.int64, device=rows.device)
            found["d_sinks"] = self._largest(
                outputs.d_sinks[:, None].double(), self.truth.d_sinks[:, None], whole
            )
        return found

    def _largest(
        self,
        given: Tensor,  # [R, ...]
        exact: Tensor,  # [R, ...]
        group_ids: Tensor,  # [R]
    ) -> float:
        """Norm of the difference over the norm of the truth, in the worst group; NaN if any is."""
        sums = given.new_zeros(2, int(self.group_ids[-1]) + 1)
        sums[0].index_add_(0, group_ids, (given - exact).square().flatten(1).sum(1))
        sums[1].index_add_(0, group_ids, exact.square().flatten(1).sum(1))
        return float((sums[0] / sums[1])[torch.unique(group_ids)].sqrt().max())


def _tokens(places: Tensor | None, group_ids: Tensor) -> Tensor:
    """[R] indices in the shared row; all of its tokens, in order, if none are given."""
    return torch.arange(len(group_ids), device=group_ids.device) if places is None else places
