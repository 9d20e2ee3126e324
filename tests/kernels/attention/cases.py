"""Rows and inputs for attention, and functions that run it and return all there is to compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.attention import (
    AttentionOptions,
    SharedLayout,
    build_layout,
    shared_attention,
)
from dpofast_kernels.attention.call import AttentionCall

Groups = Sequence[tuple[int, Sequence[int]]]
# The public op, and one back end.
Op = Callable[[Tensor, Tensor, Tensor, SharedLayout, AttentionOptions], Tensor]
Attention = Callable[[AttentionCall], Tensor]

# Pairs, one tail, five tails, empty tails in any place, prefixes of one token.
GROUPS: Groups = ((7, (5, 3)), (1, (1, 1)), (4, (9,)), (3, (0, 6)), (6, (2, 0)), (1, (0, 0)))
MANY_TAILS: Groups = ((5, (3, 0, 7, 1, 2)), (1, (4,)), (9, (0,)), (2, (0, 1, 0, 4)))
WINDOWS = (None, 1, 3, 6, 11, 1000)  # the longest sequence has 12 tokens
LENGTHS = Path(__file__).resolve().parents[3] / "benchmarks" / "lengths.json"


def real_groups(num_pairs: int, skip: int = 0) -> Groups:
    """Lengths of real pairs: prompts, chosen and rejected answers."""
    pairs = json.loads(LENGTHS.read_text())["dpo_en_demo"][skip : skip + num_pairs]
    assert len(pairs) == num_pairs
    return [(prompt, (chosen, rejected)) for _, prompt, chosen, rejected in pairs]


@dataclass(frozen=True)
class Heads:
    """Numbers of heads, and their sizes."""

    query: int
    key: int
    dim: int
    value_dim: int


HEADS = {
    "mha": Heads(3, 3, 8, 8),
    "gqa": Heads(6, 2, 10, 10),
    "mqa": Heads(5, 1, 7, 7),
    "narrow values": Heads(4, 2, 12, 5),
    "wide values": Heads(2, 2, 5, 16),
}


@dataclass
class Inputs:
    """Tensors in one dtype, among them the upstream gradient."""

    layout: SharedLayout
    query: Tensor  # [T, Hq, D]
    key: Tensor  # [T, Hkv, D]
    value: Tensor  # [T, Hkv, Dv]
    sinks: Tensor  # [Hq]
    d_output: Tensor  # [T, Hq, Dv]

    def to(self, device: str, dtype: torch.dtype) -> Inputs:
        """The same numbers on a device, in a dtype."""
        names = ("query", "key", "value", "sinks", "d_output")
        moved = {name: getattr(self, name).to(device, dtype) for name in names}
        return Inputs(self.layout.to(device), **moved)


def make_inputs(groups: Groups, heads: Heads, dtype: torch.dtype = torch.float64) -> Inputs:
    layout = build_layout(groups)
    generator = torch.Generator().manual_seed(len(groups))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    num_tokens = layout.num_tokens
    return Inputs(
        layout,
        query=random(num_tokens, heads.query, heads.dim),
        key=random(num_tokens, heads.key, heads.dim),
        value=random(num_tokens, heads.key, heads.value_dim),
        sinks=random(heads.query),
        d_output=random(num_tokens, heads.query, heads.value_dim),
    )


def run(
    inputs: Inputs,
    options: AttentionOptions,
    op: Op = shared_attention,
    with_sinks: bool = False,
) -> dict[str, Tensor]:
    """The output of an op, and the gradient of every input."""
    names = ("query", "key", "value", *(("sinks",) if with_sinks else ()))
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in names}
    options = replace(options, sinks=leaves.get("sinks"))
    out = op(leaves["query"], leaves["key"], leaves["value"], inputs.layout, options)
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.d_output.to(out.dtype))
    return {"output": out.detach(), **dict(zip(names, gradients, strict=True))}


def as_op(attention: Attention) -> Op:
    """A back end called with the arguments of `shared_attention`, without its checks."""
    return lambda *arguments: attention(AttentionCall(*arguments))


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The output within 1e-12, the gradients within 1e-11."""
    assert got.keys() == expected.keys()
    for name, truth in expected.items():
        assert got[name].shape == truth.shape, name
        assert got[name].dtype == truth.dtype == torch.float64, name
        assert truth.isfinite().all(), name
        error = (got[name] - truth).abs().max().item()
        assert error <= (1e-12 if name == "output" else 1e-11), (name, error)


def relative_errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference, divided by the norm of the truth."""
    return {
        name: ((got[name].double() - truth.double()).norm() / truth.double().norm()).item()
        for name, truth in expected.items()
    }


def sequences_of(groups: Groups) -> list[Tensor]:
    """The tokens of every sequence, by their place in the row; computed without a layout."""
    sequences, start = [], 0
    for prefix, tails in groups:
        shared = list(range(start, start + prefix))
        start += prefix
        for tail in tails:
            sequences.append(torch.tensor([*shared, *range(start, start + tail)]))
            start += tail
    return sequences


def run_alone(
    inputs: Inputs, groups: Groups, window: int | None, chunk: int | None = None
) -> dict[str, Tensor]:
    """The result of `run` from PyTorch's attention of each sequence, a prefix once per tail.

    The upstream gradient of a prefix's output is given to its first sequence.
    """
    leaves = [t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value)]
    out = torch.zeros_like(inputs.d_output)
    loss = torch.zeros((), dtype=out.dtype)
    seen: set[int] = set()
    for tokens in sequences_of(groups):
        query, key, value = (leaf[tokens].transpose(0, 1)[None] for leaf in leaves)
        position = torch.arange(len(tokens))
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance < (window or len(tokens)))
        if chunk is not None:
            mask &= position[:, None] // chunk == position // chunk
        alone = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        alone = alone[0].transpose(0, 1)  # [n, Hq, Dv]
        out[tokens] = alone.detach()
        new = torch.tensor([token not in seen for token in tokens.tolist()])
        seen |= set(tokens.tolist())
        loss = loss + (alone * inputs.d_output[tokens])[new].sum()
    gradients = torch.autograd.grad(loss, leaves)
    return {"output": out, **dict(zip(("query", "key", "value"), gradients, strict=True))}
