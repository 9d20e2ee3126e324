"""The packed rows of the attention benchmark, with lengths of real pairs, and their inputs."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpofast.data.tokens.truncate import LengthLimits
from dpofast_kernels.attention import AttentionOptions, SharedLayout, build_layout

Group = tuple[int, tuple[int, int]]  # tokens of a pair's shared prefix, and of its two tails

MAX_LENGTH = 1024  # tokens of prompt and answer; longer pairs are cut as in training
# Standard deviation of the queries, and thus of the scaled scores. With this value a query's
# attention weights are neither even nor all on one key.
QUERY_STD = 2.0
# Options of attention that models have. Gemma-2 caps at 50, which these scores would hardly reach.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 128},
    "softcap": {"softcap": 5.0},
    "sinks": {},
}
DATA = ("dpo_en_demo", "instruction_preference")
_LENGTHS = Path(__file__).with_name("lengths.json")
# The backward needs five products where the forward needs two.
_PRODUCTS = {"forward": 2, "forward_backward": 7}


@dataclass(frozen=True)
class Heads:
    """Number of query heads, number of key and value heads, and the size of a head."""

    query: int
    key: int
    dim: int


MODELS = {
    "qwen2.5-0.5b": Heads(14, 2, 64),
    "qwen2.5-7b": Heads(28, 4, 128),
    "llama-3-8b": Heads(32, 8, 128),
}


@dataclass(frozen=True)
class Case:
    """One packed row.

    Attributes:
        model: key of `MODELS`; gives the heads.
        data: data set whose pairs give the lengths.
        max_tokens: largest number of tokens; the row holds the pairs that fit.
        kind: key of `KINDS`; gives the options of attention.
        dtype: torch's name for the dtype of query, key and value.
    """

    model: str
    data: str
    max_tokens: int
    kind: str
    dtype: str

    @property
    def heads(self) -> Heads:
        return MODELS[self.model]

    @property
    def name(self) -> str:
        kind = "" if self.kind == "plain" else f", {self.kind}"
        return f"{self.model}, {self.data}, T={self.max_tokens}{kind}, {self.dtype}"

    @property
    def groups(self) -> list[Group]:
        return fill_row(pair_groups(self.data), self.max_tokens)

    def flop(self, step: str) -> float:
        """Floating-point operations of a pass: the matrix products of scores that aren't masked."""
        seen = build_layout(self.groups).position_ids + 1
        window = KINDS[self.kind].get("window")
        scores = int((seen if window is None else seen.clamp(max=window)).sum())
        return _PRODUCTS[step] * 2.0 * self.heads.dim * self.heads.query * scores

    def as_dict(self) -> dict[str, Any]:
        """The case as it is written to JSON."""
        groups = self.groups
        return {
            "name": self.name,
            "model": self.model,
            "data": self.data,
            "kind": self.kind,
            **KINDS[self.kind],
            "dtype": self.dtype,
            "query_heads": self.heads.query,
            "key_heads": self.heads.key,
            "head_dim": self.heads.dim,
            "pairs": len(groups),
            "T": sum(prefix + sum(tails) for prefix, tails in groups),
            "T_unshared": sum(2 * prefix + sum(tails) for prefix, tails in groups),
            "longest_sequence": max(prefix + max(tails) for prefix, tails in groups),
        }


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of all contenders, in the order of the shared row.

    Query, key, value and sinks are leaves that get gradients.

    Attributes:
        groups: prefix and tails of each pair in the row.
        layout: layout of these groups, on the tensors' device.
        query: [T, Hq, D].
        key, value: [T, Hkv, D].
        sinks: [Hq], or None.
        d_output: [T, Hq, D], the upstream gradient.
        options: window, softcap and sinks.
    """

    groups: Sequence[Group]
    layout: SharedLayout
    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    d_output: Tensor
    options: AttentionOptions


@dataclass(frozen=True, eq=False)
class Outputs:
    """Results of a contender for its R query positions and M key positions; None if not computed.

    A contender may copy tokens of the shared row. Each copy then has the token's output, and the
    token's gradient is the sum over its copies.

    Attributes:
        output: [R, Hq, D].
        d_query: [R, Hq, D].
        d_key, d_value: [M, Hkv, D].
        d_sinks: [Hq].
        query_tokens: [R] int64, index in the shared row of each query position, -1 for padding;
            None if the positions are those of the shared row.
        key_tokens: [M] int64, the same for key positions.
    """

    output: Tensor
    d_query: Tensor | None = None
    d_key: Tensor | None = None
    d_value: Tensor | None = None
    d_sinks: Tensor | None = None
    query_tokens: Tensor | None = None
    key_tokens: Tensor | None = None


@functools.cache
def pair_groups(data: str) -> list[Group]:
    """Prefix and tails of each real pair of a data set, cut to MAX_LENGTH, in the file's order."""
    rows = json.loads(_LENGTHS.read_text(encoding="utf-8"))[data]
    groups = []
    for row in rows:
        # Fields in dpo_en_demo: roles, prompt, chosen, rejected. Its answers hardly ever begin
        # alike, so their common start is taken as 0. Fields in instruction_preference: prompt,
        # common start of the answers, chosen, rejected.
        prompt, common, chosen, rejected = row if data != "dpo_en_demo" else (row[1], 0, *row[2:])
        cut = LengthLimits(MAX_LENGTH).plan_cut(prompt, chosen, rejected)
        if cut.fits:
            kept = chosen - cut.answers[0], rejected - cut.answers[1]
            common = min(common, *kept)
            groups.append((prompt + common, (kept[0] - common, kept[1] - common)))
    return groups


def fill_row(groups: Sequence[Group], max_tokens: int) -> list[Group]:
    """Take every group that still fits, in the given order.

    Raises:
        ValueError: no group fits.
    """
    row: list[Group] = []
    room = max_tokens
    for prefix, tails in groups:
        if prefix + sum(tails) <= room:
            row.append((prefix, tails))
            room -= prefix + sum(tails)
    if not row:
        raise ValueError(
            f"no pair fits into a row of {max_tokens} tokens; take more (--tokens, --side-tokens)"
        )
    return row


def make_inputs(case: Case, device: str) -> Inputs:
    """Make the inputs of a case: the same in every process."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, heads = getattr(torch, case.dtype), case.heads
    layout = build_layout(case.groups)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        # In place, because a temporary would raise the process' peak before a contender runs.
        tensor = torch.empty(*shape, dtype=dtype, device=device)
        return tensor.normal_(0.0, std, generator=generator)

    tokens = layout.num_tokens
    sinks = normal(heads.query).requires_grad_() if case.kind == "sinks" else None
    return Inputs(
        case.groups,
        layout.to(device),
        normal(tokens, heads.query, heads.dim, std=QUERY_STD).requires_grad_(),
        normal(tokens, heads.key, heads.dim).requires_grad_(),
        normal(tokens, heads.key, heads.dim).requires_grad_(),
        sinks,
        normal(tokens, heads.query, heads.dim),
        replace(AttentionOptions(**KINDS[case.kind]), sinks=sinks),
    )
