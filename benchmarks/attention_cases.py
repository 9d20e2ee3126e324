"""The rows that the attention benchmark runs, of the lengths of real pairs, and their inputs."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpofast.data.tokens.truncate import plan_cut
from dpofast_kernels.attention import AttentionOptions, SharedLayout, build_layout

Group = tuple[int, tuple[int, int]]  # tokens of a pair's prefix, and of what follows in each answer

MAX_LENGTH = 1024  # of a prompt and an answer; what is longer is cut as in training
QUERY_STD = 2.0  # of scores, too: weights are neither even nor on one key alone
# An option of a model's attention, beside none. Gemma-2 caps at 50, which would hardly show here.
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
    """Query heads, key and value heads, and the size of each."""

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
    """One row.

    Attributes:
        model: whose heads these are.
        data: whose pairs' lengths.
        max_tokens: of the row; as many pairs as fit.
        kind: of `KINDS`.
        dtype: of query, key and value, by its name in torch.
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
        """Of the products that a pass needs, over the scores that aren't masked."""
        seen = build_layout(self.groups).position_ids + 1
        window = KINDS[self.kind].get("window")
        scores = int((seen if window is None else seen.clamp(max=window)).sum())
        return _PRODUCTS[step] * 2.0 * self.heads.dim * self.heads.query * scores

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
    """What every contender gets, as the shared row has it; leaves with gradients.

    Attributes:
        groups: of the row.
        layout: of the row, on the tensors' device.
        query: [T, Hq, D].
        key, value: [T, Hkv, D].
        sinks: [Hq], or None.
        d_output: [T, Hq, D], the upstream gradient.
        options: window and softcap.
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
    """What a contender gives, R rows of queries and M rows of keys; None where it doesn't.

    Attributes:
        output: [R, Hq, D].
        d_query: [R, Hq, D].
        d_key, d_value: [M, Hkv, D].
        d_sinks: [Hq].
        query_tokens: [R] int64, the shared row's token that each row is, -1 for padding; None
            where these are the same rows. A token that stands there several times has its output
            in each, and its gradient in their sum.
        key_tokens: [M] int64, likewise.
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
    """Prefix and rests of each real pair of a data set, cut to MAX_LENGTH; in the file's order."""
    rows = json.loads(_LENGTHS.read_text(encoding="utf-8"))[data]
    groups = []
    for row in rows:
        # dpo_en_demo: roles, prompt, chosen, rejected; its answers hardly ever begin alike.
        # instruction_preference: prompt, what both answers begin with, chosen, rejected.
        prompt, common, chosen, rejected = row if data != "dpo_en_demo" else (row[1], 0, *row[2:])
        cut = plan_cut(prompt, chosen, rejected, MAX_LENGTH, "keep_start")
        if cut.fits:
            kept = chosen - cut.chosen, rejected - cut.rejected
            common = min(common, *kept)
            groups.append((prompt + common, (kept[0] - common, kept[1] - common)))
    return groups


def fill_row(groups: Sequence[Group], max_tokens: int) -> list[Group]:
    """Each group in its order, if it still fits.

    Raises:
        ValueError: none fits.
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
    """The inputs of a case: the same ones in every process."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, heads = getattr(torch, case.dtype), case.heads
    layout = build_layout(case.groups)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        # In place: a temporary would raise the peak that contenders are measured from.
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
