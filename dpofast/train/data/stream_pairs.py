"""The pairs of a stream in their order, and where in the stream each of them is."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import datasets
import pyarrow as pa

from dpofast.data import TokenStream, refuse_nothing_kept
from dpofast.errors import DataError

READ_ROWS = 1000  # most rows that are read at a time
# Rows without a pair for training after which the run stops: the stream may never give one.
USELESS_ROWS = 100_000


@dataclass(frozen=True)
class Place:
    """The place of a pair in a stream.

    Attributes:
        epoch: how often the stream was read to its end before.
        row: rows of this pass before it, or fewer.
        pair: pairs of these other rows before it, not counting those that are left out.
    """

    epoch: int = 0
    row: int = 0
    pair: int = 0


@dataclass(frozen=True)
class TakenPairs:
    """Consecutive pairs of one pass over a stream.

    Attributes:
        pairs: the tokenised pairs.
        start: the place of the first pair.
        is_text: whether the pairs are text that isn't messages.
    """

    pairs: datasets.Dataset
    start: Place
    is_text: bool


@dataclass
class _Part:
    """Pairs that were read together.

    Attributes:
        row: the first row that was read.
        pairs: the pairs of these rows.
        taken: pairs at the beginning that have been taken.
    """

    row: int
    pairs: pa.Table
    taken: int = 0


class StreamPairs:
    """Takes pairs from a stream, and reads no more of it than that needs.

    Args:
        tokens: the stream.
    """

    def __init__(self, tokens: TokenStream) -> None:
        self.tokens = tokens
        self._parts: deque[_Part] = deque()
        self._to_skip = 0
        self._is_text = False

    def start(self, place: Place) -> None:
        """Make the pair at this place the next one."""
        self.tokens.start(place.epoch, place.row)
        self._parts.clear()
        self._to_skip = place.pair

    @property
    def place(self) -> Place:
        """The place of the next pair, or the end of the pass."""
        if self._parts:
            part = self._parts[0]
            return Place(self.tokens.epoch, part.row, part.taken)
        return Place(self.tokens.epoch, self.tokens.row, self._to_skip)

    def take(self, num_pairs: int) -> TakenPairs | None:
        """The next pairs: fewer at the end of a pass, and None if none is left of it.

        Raises:
            DataError: rows can't be used or read, or none of many rows has a pair for training.
        """
        taken: list[pa.Table] = []
        start, count = self.place, 0
        while count < num_pairs and self._has_pairs(num_pairs - count):
            part = self._parts[0]
            pairs = part.pairs.slice(part.taken, num_pairs - count)
            taken.append(pairs)
            count += len(pairs)
            part.taken += len(pairs)
            if part.taken == len(part.pairs):
                self._parts.popleft()
        if not taken:
            return None
        # Columns that only some rows have are filled up with nulls.
        table = pa.concat_tables(taken, promote_options="default")
        return TakenPairs(datasets.Dataset(table), start, self._is_text)

    def _has_pairs(self, num_pairs: int) -> bool:
        """Read on if no pair is waiting; False at the end of the pass.

        Args:
            num_pairs: pairs that are needed.
        """
        useless = 0
        while not self._parts and not self.tokens.ended:
            rows = self.tokens.read(min(num_pairs + self._to_skip, READ_ROWS))
            self._is_text = self._is_text or rows.is_text
            skipped = min(self._to_skip, len(rows.pairs))
            self._to_skip -= skipped
            if skipped < len(rows.pairs):
                table = rows.pairs.with_format("arrow")[:]
                self._parts.append(_Part(rows.first_row, table, skipped))
            useless = 0 if len(rows.pairs) else useless + self.tokens.row - rows.first_row
            if useless >= USELESS_ROWS:
                refuse_nothing_kept(self.tokens.report())
                raise DataError(
                    f"{self.tokens.name}: {useless} rows up to row {self.tokens.row} have no pair "
                    "that can be trained on; filter the stream, or end it with take()."
                )
        return bool(self._parts)
