"""Reads the answers of a tokenised dataset: their token ids, keys, and names for messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dpofast.columns import ID_COLUMNS, UNPAIRED
from dpofast.errors import DataError
from dpofast.reference.store.keys import KEY_BYTES, TokenLists, row_keys, unique_keys

if TYPE_CHECKING:
    from datasets import Dataset

SIDES = ("chosen", "rejected")
READ_ROWS = 10_000  # rows read from the dataset at a time


@dataclass(frozen=True)
class PairAnswers:
    """The answers of a dataset's r rows, and the pairs of them.

    A row has one or two answers. With two, row i is pair i: answer 2i is its chosen one and answer
    2i + 1 its rejected one. With one, answer i is that of row i, and any two can be a pair.

    Attributes:
        prompt_ids: token ids of the prompts, r lists.
        answer_ids: token ids of the answers: r lists for each of the row's answers.
        keys: [a, 16] uint8, key of each answer in the store.
        first: [u] int64, first occurrence of each distinct answer, sorted by key.
        pairs: [n, 2] int64, chosen and rejected answer of each pair.
        source_numbers: [r] int64, number of each row in its source, used in messages.
        sources: name of the dataset that each row of a mixture comes from; None without a mixture.
        places: [r] int64, number of each answer in a row of the source that has many, used in
            messages; None if its name is that of its side.
    """

    prompt_ids: TokenLists
    answer_ids: tuple[TokenLists, ...]
    keys: np.ndarray
    first: np.ndarray
    pairs: np.ndarray
    source_numbers: np.ndarray
    sources: pa.ChunkedArray | None = None
    places: np.ndarray | None = None

    def ids(self, answer: int) -> tuple[list[int], list[int]]:
        """Return the prompt ids and the answer ids of an answer, given as an index below a."""
        row, side = divmod(answer, len(self.answer_ids))
        return self.prompt_ids[row].tolist(), self.answer_ids[side][row].tolist()

    def lengths(self, answers: np.ndarray) -> np.ndarray:
        """Count the tokens in prompt and answer, for answers [m] int64: [m] int64."""
        rows, sides = np.divmod(answers, len(self.answer_ids))
        answer_lengths = np.stack([each.lengths for each in self.answer_ids])  # [1 or 2, r]
        lengths: np.ndarray = self.prompt_ids.lengths[rows] + answer_lengths[sides, rows]
        return lengths

    def prompts(self, answers: np.ndarray) -> np.ndarray:
        """Number the prompts of answers [m] int64, with equal numbers for equal prompts.

        Returns:
            [m] int64, numbers from 0 in the order in which the prompts first appear.
        """
        numbers: dict[bytes, int] = {}
        found = [
            numbers.setdefault(self.prompt_ids[row].tobytes(), len(numbers))
            for row in (answers // len(self.answer_ids)).tolist()
        ]
        return np.array(found, np.int64)

    def name(self, answer: int) -> str:
        """Name an answer in messages, such as "row 7 (chosen)" or "pairs.json, row 7 (chosen)"."""
        row, side = divmod(answer, len(self.answer_ids))
        source = "" if self.sources is None else f"{self.sources[row].as_py()}, "
        name = SIDES[side] if self.places is None else f"answer {self.places[row]}"
        return f"{source}row {self.source_numbers[row]} ({name})"


def read_answers(rows: Dataset, pairs: np.ndarray | None = None) -> PairAnswers:
    """Read the answers of a tokenised dataset, and make their keys.

    Args:
        rows: dataset with columns prompt_ids, chosen_ids and rejected_ids. An optional int column
            `row` numbers the rows in their source, which an optional column `source` names. With
            `pairs`, completion_ids takes the place of the two columns of answers, and an optional
            int column `completion` numbers the answers of a row in the source.
        pairs: [n, 2] int64, the row of the chosen and of the rejected answer of each pair; None if
            each row is a pair.

    Raises:
        DataError: a column is missing, doesn't contain lists of ints, or contains a null.
    """
    columns = ID_COLUMNS if pairs is None else UNPAIRED.id_columns
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise DataError(
            f"The dataset has no column {missing[0]!r}: reference log-probs are made of tokenised "
            f"pairs ({', '.join(columns)}), see tokenize_preferences."
        )
    places = [name for name in ("row", "source", "completion") if name in rows.column_names]
    wanted = rows.select_columns([*columns, *places])
    # Batches in Arrow format follow the dataset's order, even after a shuffle or a selection.
    batches = wanted.with_format("arrow").iter(READ_ROWS)
    # An empty dataset gives no batches, but its table has the columns' types.
    table = pa.concat_tables(batches) if len(rows) else wanted.data.table
    prompts, *answers = (_token_lists(table.column(name), name) for name in columns)
    keys = np.empty((len(answers) * len(rows), KEY_BYTES), np.uint8)
    for side, each in enumerate(answers):
        keys[side :: len(answers)] = row_keys(prompts, each)
    return PairAnswers(
        prompts,
        tuple(answers),
        keys,
        unique_keys(keys)[0],
        pairs=np.arange(len(keys)).reshape(-1, 2) if pairs is None else pairs,
        source_numbers=table["row"].to_numpy() if "row" in places else np.arange(len(rows)),
        sources=table["source"] if "source" in places else None,
        places=table["completion"].to_numpy() if "completion" in places else None,
    )


def _token_lists(column: pa.ChunkedArray, name: str) -> TokenLists:
    """Convert an Arrow column of lists; `name` is the column's name in errors."""
    try:
        lengths: Any = pa.compute.list_value_length(column)
        values: Any = pa.compute.list_flatten(column)
        ids = values.cast(pa.int64())
    except (pa.ArrowInvalid, NotImplementedError) as error:
        raise DataError(
            f"The column {name!r} holds {column.type}, expected lists of token ids."
        ) from error
    if column.null_count or ids.null_count:
        bad = np.flatnonzero([None in (each or [None]) for each in column.to_pylist()])[0]
        raise DataError(f"Row {bad} of the column {name!r} has no token ids, or a null among them.")
    offsets = np.cumsum(np.concatenate([[0], lengths.to_numpy()]), dtype=np.int64)
    return TokenLists(ids.to_numpy(), offsets)
