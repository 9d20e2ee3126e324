"""Tokenised pairs that hold each answer once, however many of them it is in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from dpofast.columns import ID_COLUMNS

# Columns of the answers: the token ids, and the place of the answer in its row's completions.
PROMPT, ANSWER, PLACE = "prompt_ids", "completion_ids", "completion"
_READ_PAIRS = 1000  # that an iteration decodes at a time


@dataclass(frozen=True, eq=False)
class PooledPairs:
    """Pairs as indices into answers, with what the run uses of `datasets.Dataset`.

    K answers to a prompt can make K(K-1)/2 pairs. Only `index` and `columns` grow with these; the
    token ids of a pair are looked up when they are read. Answers of one row are neighbours, and
    have the same prompt ids.

    Attributes:
        answers: A rows with int lists prompt_ids and completion_ids; int `row`, the row in the
            source; int `completion`, the answer's place in the completions of that row; and
            `source`, the name of the dataset in a mixture.
        index: [n, 2] int64, the chosen and the rejected answer of each pair.
        columns: n rows with `row`, and `source`, `weight` and `label_confidence` if there are any.
        column_names: columns that reading a pair gives; by default all.
    """

    answers: datasets.Dataset
    index: np.ndarray
    columns: pa.Table
    column_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.column_names:
            names = (*ID_COLUMNS, *self.columns.column_names)
            object.__setattr__(self, "column_names", names)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Any) -> Any:
        """A pair as a dict, some pairs as a dict of lists, or a column as a list."""
        if isinstance(key, str):
            return self.select_columns([key])[:][key]
        if isinstance(key, slice):
            return self._read(np.arange(*key.indices(len(self))))
        pairs = np.atleast_1d(np.asarray(key, np.int64))
        pairs = np.where(pairs < 0, pairs + len(self), pairs)
        if np.any((pairs < 0) | (pairs >= len(self))):
            raise IndexError(f"got the pair {key}, but there are {len(self)} pairs")
        found = self._read(pairs)
        return found if np.ndim(key) else {name: values[0] for name, values in found.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.iter(_READ_PAIRS):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """Yield dicts of lists with this many pairs; the last one can have fewer."""
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]

    def select(self, indices: Sequence[int] | np.ndarray) -> PooledPairs:
        """These pairs, with the same answers."""
        taken = np.asarray(indices, np.int64)
        return replace(self, index=self.index[taken], columns=self.columns.take(pa.array(taken)))

    def select_columns(self, names: Sequence[str] | str) -> PooledPairs:
        """The pairs with these columns only.

        Raises:
            ValueError: there is no such column.
        """
        wanted = (names,) if isinstance(names, str) else tuple(names)
        missing = [name for name in wanted if name not in self.column_names]
        if missing:
            raise ValueError(f"the pairs have no column {missing[0]!r}, but {self.column_names}")
        return replace(self, column_names=wanted)

    def with_format(self, type: str) -> ArrowPairs:
        """The pairs as Arrow tables, the only format that pooled pairs can be read in.

        Raises:
            ValueError: another format is asked for.
        """
        if type != "arrow":
            raise ValueError(f"got the format {type!r}, expected 'arrow'")
        return ArrowPairs(self)

    def written_out(self) -> datasets.Dataset:
        """A Dataset of the pairs, with the ids of an answer once for each pair that it is in."""
        return datasets.Dataset(self.with_format("arrow")[:])

    def lengths(self) -> np.ndarray:
        """[n, 3] int64, tokens of prompt, chosen and rejected answer of each pair."""
        table = self.answers.select_columns([PROMPT, ANSWER]).with_format("arrow")[:]
        prompts, answers = (
            pa.compute.list_value_length(table[name]).to_numpy().astype(np.int64)
            for name in (PROMPT, ANSWER)
        )
        chosen, rejected = self.index.T
        return np.stack([prompts[chosen], answers[chosen], answers[rejected]], axis=1)

    def _read(self, pairs: np.ndarray) -> dict[str, list[Any]]:
        """The columns of pairs, given as [m] int64. Pairs share the lists of ids."""
        found: dict[str, list[Any]] = {}
        if not set(ID_COLUMNS).isdisjoint(self.column_names):
            # Each answer is decoded once, however many of the pairs it is in.
            numbers, where = np.unique(self.index[pairs], return_inverse=True)
            ids = self.answers[numbers.tolist()]
            chosen, rejected = where.reshape(-1, 2).T.tolist()
            for name, places in zip(ID_COLUMNS, (chosen, chosen, rejected), strict=True):
                of_answers = ids[PROMPT if name == ID_COLUMNS[0] else ANSWER]
                found[name] = [of_answers[place] for place in places]
        others = [name for name in self.column_names if name not in ID_COLUMNS]
        found |= self.columns.select(others).take(pa.array(pairs)).to_pydict()
        return {name: found[name] for name in self.column_names}


@dataclass(frozen=True, eq=False)
class ArrowPairs:
    """Pooled pairs that are read as Arrow tables. Tables with ids repeat an answer for each pair.

    Attributes:
        pairs: the pairs.
    """

    pairs: PooledPairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: slice) -> pa.Table:
        pairs = self.pairs
        others = pairs.columns[key]
        chosen, rejected = pairs.index[key].T
        columns = {}
        for name in pairs.column_names:
            if name in ID_COLUMNS:
                numbers = rejected if name == ID_COLUMNS[2] else chosen
                column = PROMPT if name == ID_COLUMNS[0] else ANSWER
                answers = pairs.answers.select_columns([column]).select(numbers)
                columns[name] = answers.with_format("arrow")[:][column]
            else:
                columns[name] = others[name]
        return pa.table(columns)

    def iter(self, batch_size: int) -> Iterator[pa.Table]:
        """Yield tables with this many pairs; the last one can have fewer."""
        for batch in range(math.ceil(len(self) / batch_size)):
            yield self[batch * batch_size : (batch + 1) * batch_size]
