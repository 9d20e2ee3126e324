"""How well the steps of a plan are packed, and what their rows share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpofast.data.packing.balance import PackFigures, pack_figures, pack_step
from dpofast.data.packing.token_limit import TokenLimit


@dataclass(frozen=True)
class PlanFigures(PackFigures):
    """How well some steps of a plan are packed, and how few tokens their rows have.

    In PackFigures, a "pair" of these steps is a group of pairs that stay together.

    Attributes:
        plain_tokens: tokens of the same pairs, with each of their sequences by itself.
        pair_tokens: tokens of the same pairs, with a shared prefix within each pair only.
        repeats: how often an answer runs again in a step, because its group was cut.
    """

    plain_tokens: int
    pair_tokens: int
    repeats: int

    @property
    def saved(self) -> float:
        """Fraction of the plain tokens that the body doesn't compute because they are shared."""
        return 1.0 - self.tokens / max(self.plain_tokens, 1)


def plan_figures(steps: Sequence[Sequence[int]], limit: TokenLimit, world_size: int) -> PlanFigures:
    """Pack steps and sum up the result.

    Args:
        steps: the pairs of each step, counted in the dataset.
        limit: lengths and token limit.
        world_size: number of ranks.
    """
    parts = [limit.parts(pairs) for pairs in steps]
    tokens = [[part.tokens for part in of_step] for of_step in parts]
    packed = [pack_step(of_step, world_size, limit.max_tokens) for of_step in tokens]
    found = pack_figures(zip(tokens, packed, strict=True), limit.max_tokens)
    pairs = [pair for of_step in steps for pair in of_step]
    return PlanFigures(
        **vars(found),
        plain_tokens=sum(limit.plain[pair] for pair in pairs),
        pair_tokens=sum(limit.lengths[pair] for pair in pairs),
        repeats=sum(map(limit.repeats, parts)),
    )
