"""The picture shows what the kernels' own mask says, at any size."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from dpofast.inspect import picture as attention_picture
from dpofast.inspect.picture import AttentionPicture, PicturePart, attended_cells, cell_limits
from dpofast_kernels.attention import attends, build_layout

GROUPS = ((2, (3, 2)), (1, (0, 2)))
PARTS = [
    PicturePart(0, "5 prefix", "cyan"),
    PicturePart(2, "5 chosen", "green"),
    PicturePart(5, "5 rejected", "red"),
    PicturePart(7, "2 prefix", "cyan"),
    PicturePart(8, "2 rejected", "red"),
]


def drawn(picture, width):
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(picture)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_short_row_is_shown_token_by_token():
    """A line of text shows two tokens, one in its upper half and one in its lower half."""
    lines = drawn(AttentionPicture(build_layout(GROUPS), PARTS), 80)
    assert lines == [
        "who (line) looks at whom (column); a cell is a token wide and high",
        "5 prefix   │█▄",
        "5 chosen   │███▄",
        "5 rejected │██▀▀▀▄",
        "2 prefix   │▀▀   ▀▀▄",
        "2 rejected │       ██▄",
    ]


def test_a_window_shortens_the_view():
    lines = drawn(AttentionPicture(build_layout(GROUPS), PARTS, window=2), 80)
    assert lines[1:] == [
        "5 prefix   │█▄",
        "5 chosen   │ ▀█▄",
        "5 rejected │ ▄ ▀▀▄",
        "2 prefix   │     ▀▀▄",
        "2 rejected │       ▀█▄",
    ]


def test_chunks_end_the_view():
    """The second tail's first token is in its prefix's chunk, which ends there."""
    lines = drawn(AttentionPicture(build_layout(GROUPS), PARTS, chunk=3), 80)
    assert lines[1:] == [
        "5 prefix   │█▄",
        "5 chosen   │▀▀▀▄",
        "5 rejected │▄▄ ▀▀▄",
        "2 prefix   │      ▀▄",
        "2 rejected │       ██▄",
    ]


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (9, None), (None, 12)])
def test_cells_are_what_most_of_their_tokens_do(window, chunk):
    layout = build_layout(((31, (17, 40)), (5, (0, 11)), (3, (30, 2))))
    looks = attends(layout, window, chunk)
    limits = cell_limits(layout.num_tokens, 20)
    cells = attended_cells(layout, 20, window, chunk)
    assert cells.shape == (20, 20)
    for line in range(20):
        for column in range(20):
            rows, columns = (slice(limits[i], limits[i + 1]) for i in (line, column))
            assert cells[line, column] == (looks[rows, columns].double().mean() >= 0.5)


def test_a_long_row_is_thinned_and_looks_the_same(monkeypatch):
    layout = build_layout(((400, (300, 500)), (200, (100, 300))))
    whole = attended_cells(layout, 36)
    monkeypatch.setattr(attention_picture, "MAX_TOKENS", 180)
    assert torch.equal(attended_cells(layout, 36), whole)


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_it_fits_the_terminal(width):
    layout = build_layout(((400, (300, 500)),))
    parts = [PicturePart(0, "1234 prefix", "cyan")]
    lines = drawn(AttentionPicture(layout, parts), width)[1:]
    lines = [line for line in lines if "│" in line]
    cells = min(width - 13, 96)
    assert len(lines) == (cells + 1) // 2
    assert max(map(len, lines)) == 13 + cells
