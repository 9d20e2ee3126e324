"""A small picture of which tokens of a packed row attend to which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from rich.console import Console, ConsoleOptions
from rich.text import Text
from torch import Tensor

from dpofast_kernels.attention import SharedLayout, attends

# A character is about twice as high as wide, so it shows two cells: (upper, lower).
_GLYPHS = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
_MIN_CELLS, _MAX_CELLS = 16, 96  # per side
MAX_TOKENS = 2048  # a longer row is thinned to this many, because the mask takes [T, T] memory


@dataclass(frozen=True)
class PicturePart:
    """A stretch of the row.

    Attributes:
        start: index of its first token in the row.
        label: text shown beside the line in which the stretch begins.
        style: rich style of its lines.
    """

    start: int
    label: str
    style: str


class AttentionPicture:
    """A rich renderable of the attention mask, as wide as the terminal allows.

    Lines are queries, columns are keys. A cell covers one token, or several neighbours if the row
    has more tokens than the picture has cells. A cell is filled if at least half of its (query,
    key) pairs attend.

    Args:
        layout: structure of the packed row.
        parts: stretches in the row's order; the first begins at 0.
        window: number of positions that layers with a sliding window look back; None for full
            attention.
        chunk: number of positions in a chunk of the layers that attend in chunks; None for no
            chunks.
    """

    def __init__(
        self,
        layout: SharedLayout,
        parts: Sequence[PicturePart],
        *,
        window: int | None = None,
        chunk: int | None = None,
    ) -> None:
        self.layout, self.parts, self.window, self.chunk = layout, parts, window, chunk

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        margin = max(len(part.label) for part in self.parts) + 1
        room = min(max(options.max_width - margin - 1, _MIN_CELLS), _MAX_CELLS)
        num_tokens = self.layout.num_tokens
        cells = attended_cells(self.layout, room, self.window, self.chunk).tolist()
        limits = cell_limits(num_tokens, len(cells))
        # A line of text has only one colour: the colour of the part at its upper cell's middle.
        styles = [self._part_at((start + end) // 2).style for start, end in pairwise(limits)]
        size = "a token" if len(cells) == num_tokens else f"{num_tokens / len(cells):.1f} tokens"
        yield Text(f"who (line) looks at whom (column); a cell is {size} wide and high", "italic")
        for top in range(0, len(cells), 2):
            bottom = min(top + 1, len(cells) - 1)
            label = self._label(limits[top], limits[bottom + 1])
            # With an odd number of cells, the last line has no lower half.
            below = cells[bottom] if bottom > top else [False] * len(cells)
            glyphs = "".join(_GLYPHS[pair] for pair in zip(cells[top], below, strict=True))
            yield Text.assemble((f"{label:{margin - 1}} │", "dim"), (glyphs.rstrip(), styles[top]))

    def _part_at(self, token: int) -> PicturePart:
        return max((p for p in self.parts if p.start <= token), key=lambda part: part.start)

    def _label(self, start: int, end: int) -> str:
        """Label of the first part that begins in this range of tokens, or no text."""
        return next((part.label for part in self.parts if start <= part.start < end), "")


def attended_cells(
    layout: SharedLayout, num_cells: int, window: int | None = None, chunk: int | None = None
) -> Tensor:
    """Reduce a row's attention mask to a few cells.

    Args:
        layout: structure of the packed row.
        num_cells: most cells per side; a row with fewer tokens gets one cell per token.
        window: number of positions to look back, None for full attention.
        chunk: number of positions in a chunk, None for no chunks.

    Returns:
        [n, n] bool, queries by keys; True if at least half of the cell's pairs of tokens attend.
    """
    if layout.num_tokens > MAX_TOKENS:
        layout = _thinned(layout)
    num_tokens = layout.num_tokens
    limits = cell_limits(num_tokens, min(num_cells, num_tokens))
    sizes = torch.tensor(limits).diff()
    # [n, T], 1 where a cell has a token. Two products with it count the True entries of each cell.
    member = torch.eye(len(sizes)).repeat_interleave(sizes, 1)
    # [n, T] @ [T, T] @ [T, n]
    counts = member @ attends(layout, window, chunk).float() @ member.t()
    return counts * 2 >= sizes[:, None] * sizes


def cell_limits(num_tokens: int, num_cells: int) -> list[int]:
    """Divide tokens among cells: cell i has the tokens limits[i] to limits[i + 1] - 1.

    Returns:
        [n+1] limits.
    """
    return [round(index * num_tokens / num_cells) for index in range(num_cells + 1)]


def _thinned(layout: SharedLayout) -> SharedLayout:
    """Keep MAX_TOKENS evenly spaced tokens of a long row, with the fields that `attends` reads."""
    kept = torch.linspace(0, layout.num_tokens - 1, MAX_TOKENS).long()
    names = ("position_ids", "group_ids", "tail_ids")
    return replace(layout, **{name: getattr(layout, name)[kept] for name in names})
