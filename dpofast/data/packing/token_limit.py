"""The token limit on packed rows, and what a plan needs to stay within it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpofast.data.packing.collate import Layout
from dpofast.data.packing.prompt_groups import Part, PromptGroups


@dataclass(frozen=True)
class TokenLimit:
    """The token limit on packed rows, and the lengths that a plan needs to stay within it.

    Attributes:
        lengths: tokens that each pair of the dataset alone adds to a packed row.
        max_tokens: most tokens in a row; a longer pair gets a row of its own.
        plain: tokens of the sequences of each pair, shared prefixes counted twice.
        groups: prompts and answers of the pairs, if a row runs each answer once; None if each pair
            is by itself.
    """

    lengths: Sequence[int]
    max_tokens: int
    plain: Sequence[int]
    groups: PromptGroups | None = None

    def parts(self, pairs: Sequence[int]) -> list[Part]:
        """What a step's pairs add to rows: groups of pairs that stay together."""
        if self.groups is not None:
            return self.groups.parts(pairs, self.max_tokens)
        return [Part([pair], self.lengths[pair]) for pair in pairs]

    def repeats(self, parts: Sequence[Part]) -> int:
        """How many answers of these parts of a step run again, as their group was cut."""
        if self.groups is None:
            return 0
        answers = [np.unique(self.groups.answers[part.pairs]) for part in parts]
        together = np.concatenate([np.empty(0, np.int64), *answers])
        return len(together) - len(np.unique(together))


def token_limit(groups: PromptGroups, layout: Layout, max_tokens: int) -> TokenLimit | None:
    """The limit of a dataset's packed rows.

    Args:
        groups: prompts and answers of the dataset's pairs.
        layout: layout of the micro-batches.
        max_tokens: most tokens in a packed row.

    Returns:
        The limit, or None if the layout is padded: then a plan counts pairs, not tokens.
    """
    if not layout.is_packed:
        return None
    plain = groups.lengths[groups.answers].sum(1)  # [n]
    lengths = groups.pair_tokens if layout.shares else plain
    return TokenLimit(
        lengths.tolist(),
        max_tokens,
        plain.tolist(),
        groups if layout.runs_answers_once else None,
    )
