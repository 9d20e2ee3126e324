"""Fixtures of the tests that run the head's kernels on a device."""

from __future__ import annotations

import pytest

from dpofast_kernels.head import chunked
from dpofast_kernels.head.workspace import ChunkLimits


@pytest.fixture
def chunk_rows(monkeypatch):
    """A function that sets the most rows of a chunk, whatever fits the workspace."""

    def limit(rows: int) -> None:
        monkeypatch.setattr(chunked, "chunk_limits", lambda *_: ChunkLimits(rows, rows, rows))

    return limit


@pytest.fixture
def scored_rows(monkeypatch) -> list[int]:
    """A list that the number of rows of every scored chunk is appended to."""
    numbers = []
    score = chunked.ChunkedHead.score

    def counting(head, rows, *given, **named):
        numbers.append(rows.stop - rows.start)
        return score(head, rows, *given, **named)

    monkeypatch.setattr(chunked.ChunkedHead, "score", counting)
    return numbers
