"""Contenders of the attention benchmark: our back ends on a shared row, and the alternatives.

All do the same work: causal attention over the same sequences, and the gradients of queries, keys
and values (and sinks). The shared row holds the common prefix of a pair once. Contenders that take
each sequence separately hold it twice. All inputs are laid out before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.attention_cases import Group, Inputs, Outputs
from benchmarks.harness import AbsentError, Contender
from benchmarks.suite import Entry, Work
from benchmarks.suite import contender as make_contender
from dpofast_kernels.attention import (
    AttentionOptions,
    SharedLayout,
    backend_for,
    build_layout,
    shared_attention,
)
from dpofast_kernels.attention.backends import machine_of, why_not
from dpofast_kernels.attention.call import AttentionCall
from dpofast_kernels.attention.flash import padded_head_dim, varlen_on_gathered

PADDING = -1  # index of a position that holds no token

Attend = Callable[[Tensor, Tensor, Tensor, AttentionOptions], Tensor]


def contender(name: str, inputs: Inputs, step: str) -> Contender:
    """Bind a contender to its inputs; `step` is "forward" or "forward_backward"."""
    return make_contender(name, ENTRIES[name], inputs, step)


def _work(
    attend: Attend,
    states: Sequence[Tensor],  # query, key, value and upstream gradient, as `attend` takes them
    inputs: Inputs,
    query_tokens: Tensor | None = None,
    key_tokens: Tensor | None = None,
) -> Work:
    """Both passes of a contender; `query_tokens` and `key_tokens` are explained at `Outputs`."""
    query, key, value, d_output = states
    sinks = [] if inputs.sinks is None else [inputs.sinks]
    leaves = [query, key, value, *sinks]

    @torch.no_grad()
    def forward() -> Outputs:
        output = attend(query, key, value, inputs.options)
        return Outputs(_rows(output), query_tokens=query_tokens)

    def forward_backward() -> Outputs:
        output = attend(query, key, value, inputs.options)
        d_query, d_key, d_value, *d_sinks = torch.autograd.grad(output, leaves, d_output)
        return Outputs(
            _rows(output.detach()),
            _rows(d_query),
            _rows(d_key),
            _rows(d_value),
            d_sinks[0] if d_sinks else None,
            query_tokens,
            key_tokens,
        )

    return Work(forward, forward_backward, leaves)


def _rows(states: Tensor) -> Tensor:
    """Flatten [S, L, H, D] to [R, H, D]; [R, H, D] stays as it is."""
    return states.flatten(0, -3)


def _ours(backend: str) -> Entry:
    def make(inputs: Inputs) -> Work:
        _refuse(backend, inputs)
        attend = _on_row(inputs.layout, backend)
        return _work(attend, (inputs.query, inputs.key, inputs.value, inputs.d_output), inputs)

    return Entry(make)


def _on_row(layout: SharedLayout, backend: str) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        return shared_attention(query, key, value, layout, replace(options, backend=backend))

    return attend


def _refuse(backend: str, inputs: Inputs) -> None:
    query = inputs.query
    # Flash kernels pad heads; whether they can run depends on the padded size.
    head_dim = padded_head_dim(query.shape[-1], inputs.value.shape[-1])
    reason = why_not(backend, machine_of(query.device), query.dtype, head_dim, inputs.options)
    if reason is not None:
        raise AbsentError(reason)


def _unshared(inputs: Inputs) -> Work:
    backend = backend_for(inputs.query, inputs.value, inputs.options)
    sequences = list(sequence_tokens(inputs.groups))
    tokens = torch.cat(sequences).to(inputs.query.device)
    # A sequence that shares nothing is a prefix with one empty tail.
    layout = build_layout([(len(each), (0,)) for each in sequences]).to(tokens.device)
    return _work(_on_row(layout, backend), _copied(inputs, tokens), inputs, tokens, tokens)


def _padded(inputs: Inputs) -> Work:
    options = inputs.options
    if (options.window, options.softcap, options.sinks) != (None, None, None):
        raise AbsentError("SDPA knows no window without a dense mask, no softcap and no sinks")
    tokens = pad_sequence(
        list(sequence_tokens(inputs.groups)), batch_first=True, padding_value=PADDING
    ).to(inputs.query.device)  # [S, L]

    def attend(query: Tensor, key: Tensor, value: Tensor, _options: AttentionOptions) -> Tensor:
        # [S, L, H, D], the form of a model's projections. Causal attention never sees the padding,
        # which is on the right.
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        ).transpose(1, 2)

    flat = tokens.flatten()
    return _work(attend, _copied(inputs, tokens), inputs, flat, flat)


def _varlen_alone(inputs: Inputs) -> Work:
    _refuse("varlen", inputs)
    if inputs.query.shape[-1] != padded_head_dim(inputs.query.shape[-1], inputs.value.shape[-1]):
        raise AbsentError("its heads would have to be padded")
    layout, options = inputs.layout, inputs.options
    options = replace(options, scale=options.scale_for(inputs.query.shape[-1]))

    def attend(query: Tensor, key: Tensor, value: Tensor, _options: AttentionOptions) -> Tensor:
        return varlen_on_gathered(AttentionCall(query, key, value, layout, options))

    key, value = (_leaf(states, layout.key_tokens) for states in (inputs.key, inputs.value))
    states = (inputs.query, key, value, inputs.d_output)
    return _work(attend, states, inputs, None, layout.key_tokens)


def sequence_tokens(groups: Sequence[Group]) -> Iterator[Tensor]:
    """Yield each sequence's indices in the shared row, chosen and rejected in turn."""
    start = 0
    for prefix, tails in groups:
        tail = start + prefix
        for length in tails:
            yield torch.cat(
                [torch.arange(start, start + prefix), torch.arange(tail, tail + length)]
            )
            tail += length
        start = tail


def _copied(
    inputs: Inputs,
    tokens: Tensor,  # [...], indices in the shared row, or PADDING
) -> list[Tensor]:
    """Copy the query, key, value and upstream gradient of these tokens, each [..., H, D].

    A token's upstream gradient is divided by its number of copies: the copies' gradients then add
    up to the shared row's. Padding gets zero.
    """
    # Number of copies of each token.
    counts = torch.bincount(tokens[tokens != PADDING], minlength=len(inputs.query))
    d_output = inputs.d_output / counts[:, None, None].to(inputs.d_output.dtype)
    d_output = d_output[tokens.clamp(min=0)] * (tokens != PADDING)[..., None, None]
    states = [_leaf(each, tokens.clamp(min=0)) for each in (inputs.query, inputs.key, inputs.value)]
    return [*states, d_output]


def _leaf(states: Tensor, tokens: Tensor) -> Tensor:
    return states.detach()[tokens].requires_grad_()


ENTRIES: dict[str, Entry] = {
    "ours_flash3": _ours("flash3"),
    "ours_varlen": _ours("varlen"),
    "ours_flash_attn": _ours("flash_attn"),
    "ours_flex": _ours("flex"),
    "ours_sdpa": _ours("sdpa"),
    "ours_plain": _ours("plain"),
    "unshared": Entry(_unshared, "each sequence for itself in one row, by the default back end"),
    "padded": Entry(_padded, "SDPA over sequences padded to the longest, no mask"),
    "varlen_alone": Entry(
        _varlen_alone, "keys and values are gathered before, their gradients not added"
    ),
}
OURS = tuple(name for name in ENTRIES if name.startswith("ours_"))
