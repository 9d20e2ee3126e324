"""A small picture of what attends to what in a packed row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from rich.console import Console, ConsoleOptions
from rich.text import Text
from torch import Tensor

from dpofast_kernels.attention import SharedLayout, attends

# Two cells share a character's height, so that a cell is about as high as wide.
_GLYPHS = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
_MIN_CELLS, _MAX_CELLS = 16, 96
_MAX_TOKENS = 2048  # of a longer row so many are looked at, evenly spaced


@dataclass(frozen=True)
class PicturePart:
    """A stretch of the row: where it begins, what it is called, and its colour."""

    start: int
    label: str
    style: str


class AttentionPicture:
    """A rich renderable as wide as the terminal allows: lines look at columns.

    A cell stands for one token, or where there are more tokens than cells for some neighbours; it
    is filled where at least half of its tokens look at each other.

    Args:
        layout: of the row.
        parts: in the row's order; the first begins at 0.
        window: of layers that look back only so far, in positions.
    """

    def __init__(
        self, layout: SharedLayout, parts: Sequence[PicturePart], window: int | None = None
    ) -> None:
        self.layout, self.parts, self.window = layout, parts, window

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        margin = max(len(part.label) for part in self.parts) + 1
        room = min(max(options.max_width - margin - 1, _MIN_CELLS), _MAX_CELLS)
        num_tokens = self.layout.num_tokens
        cells = attended_cells(self.layout, room, self.window).tolist()
        limits = cell_limits(num_tokens, len(cells))
        styles = [self._part_at((start + end) // 2).style for start, end in pairwise(limits)]
        is_single = len(cells) == num_tokens
        size = "a token" if is_single else f"{num_tokens / len(cells):.1f} tokens"
        yield Text(f"who (line) looks at whom (column); a cell is {size} wide and high", "italic")
        for top in range(0, len(cells), 2):
            bottom = min(top + 1, len(cells) - 1)
            label = self._label(limits[top], limits[bottom + 1])
            below = cells[bottom] if bottom > top else [False] * len(cells)
            glyphs = "".join(_GLYPHS[pair] for pair in zip(cells[top], below, strict=True))
            yield Text.assemble((f"{label:{margin - 1}} │", "dim"), (glyphs.rstrip(), styles[top]))

    def _part_at(self, token: int) -> PicturePart:
        return max((p for p in self.parts if p.start <= token), key=lambda part: part.start)

    def _label(self, start: int, end: int) -> str:
        """Of the first part that begins there."""
        return next((part.label for part in self.parts if start <= part.start < end), "")


def attended_cells(layout: SharedLayout, num_cells: int, window: int | None = None) -> Tensor:
    """[n, n] bool, n at most `num_cells` and the row's tokens: queries, keys.

    True where at least half of the cell's pairs of tokens attend.
    """
    if layout.num_tokens > _MAX_TOKENS:
        layout = _thinned(layout)
    num_tokens = layout.num_tokens
    limits = cell_limits(num_tokens, min(num_cells, num_tokens))
    sizes = torch.tensor(limits).diff()
    member = torch.eye(len(sizes)).repeat_interleave(sizes, 1)  # [n, T]
    counts = member @ attends(layout, window).float() @ member.t()
    return counts * 2 >= sizes[:, None] * sizes


def cell_limits(num_tokens: int, num_cells: int) -> list[int]:
    """[n+1]: the tokens of cell i are limits[i] to limits[i + 1] - 1."""
    return [round(index * num_tokens / num_cells) for index in range(num_cells + 1)]


def _thinned(layout: SharedLayout) -> SharedLayout:
    """Some of a long row's tokens, with all that `attends` reads of them."""
    kept = torch.linspace(0, layout.num_tokens - 1, _MAX_TOKENS).long()
    names = ("position_ids", "group_ids", "tail_ids")
    return replace(layout, **{name: getattr(layout, name)[kept] for name in names})
