"""Reads the answers of a tokenised dataset: their token ids, keys, and names for messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dpofast.columns import ID_COLUMNS
from dpofast.errors import DataError
from dpofast.reference.store.keys import KEY_BYTES, TokenLists, row_keys, unique_keys

if TYPE_CHECKING:
    from datasets import Dataset

SIDES = ("chosen", "rejected")
READ_PAIRS = 10_000  # pairs read from the dataset at a time


@dataclass(frozen=True)
class PairAnswers:
    """The 2n answers of n pairs: answer 2i is pair i's chosen one, answer 2i + 1 its rejected one.

    Attributes:
        tokens: token ids by column (`prompt_ids`, `chosen_ids`, `rejected_ids`), n lists each.
        keys: [2n, 16] uint8, key of each answer in the store.
        first: [u] int64, first occurrence of each distinct answer, sorted by key.
        source_numbers: [n] int64, number of each pair in its source, used in messages.
        sources: name of the dataset that each pair of a mixture comes from; None without a mixture.
    """

    tokens: dict[str, TokenLists]
    keys: np.ndarray
    first: np.ndarray
    source_numbers: np.ndarray
    sources: pa.ChunkedArray | None = None

    def ids(self, answer: int) -> tuple[list[int], list[int]]:
        """Return the prompt ids and the answer ids of an answer, given as an index below 2n."""
        pair, side = divmod(answer, 2)
        prompt = self.tokens["prompt_ids"][pair]
        return prompt.tolist(), self.tokens[ID_COLUMNS[1 + side]][pair].tolist()

    def lengths(self, answers: np.ndarray) -> np.ndarray:
        """Count the tokens in prompt and answer, for answers [m] int64: [m] int64."""
        pairs, sides = np.divmod(answers, 2)
        answer_lengths = np.stack([self.tokens[name].lengths for name in ID_COLUMNS[1:]])  # [2, n]
        prompt_lengths = self.tokens["prompt_ids"].lengths  # [n]
        lengths: np.ndarray = prompt_lengths[pairs] + answer_lengths[sides, pairs]
        return lengths

    def prompts(self, answers: np.ndarray) -> np.ndarray:
        """Number the prompts of answers [m] int64, with equal numbers for equal prompts.

        Returns:
            [m] int64, numbers from 0 in the order in which the prompts first appear.
        """
        prompt_ids = self.tokens["prompt_ids"]
        numbers: dict[bytes, int] = {}
        found = [
            numbers.setdefault(prompt_ids[pair].tobytes(), len(numbers))
            for pair in (answers // 2).tolist()
        ]
        return np.array(found, np.int64)

    def name(self, answer: int) -> str:
        """Name an answer in messages, such as "row 7 (chosen)" or "pairs.json, row 7 (chosen)"."""
        pair, side = divmod(answer, 2)
        source = "" if self.sources is None else f"{self.sources[pair].as_py()}, "
        return f"{source}row {self.source_numbers[pair]} ({SIDES[side]})"


def read_answers(pairs: Dataset) -> PairAnswers:
    """Read the answers of a tokenised dataset, and make their keys.

    Args:
        pairs: dataset with columns prompt_ids, chosen_ids and rejected_ids. An optional int column
            `row` numbers the pairs in their source, which an optional column `source` names.

    Raises:
        DataError: a column is missing, doesn't contain lists of ints, or contains a null.
    """
    missing = [name for name in ID_COLUMNS if name not in pairs.column_names]
    if missing:
        raise DataError(
            f"The dataset has no column {missing[0]!r}: reference log-probs are made of tokenised "
            f"pairs ({', '.join(ID_COLUMNS)}), see tokenize_preferences."
        )
    places = [name for name in ("row", "source") if name in pairs.column_names]
    wanted = pairs.select_columns([*ID_COLUMNS, *places])
    # Batches in Arrow format follow the dataset's order, even after a shuffle or a selection.
    batches = wanted.with_format("arrow").iter(READ_PAIRS)
    # An empty dataset gives no batches, but its table has the columns' types.
    table = pa.concat_tables(batches) if len(pairs) else wanted.data.table
    tokens = {name: _token_lists(table.column(name), name) for name in ID_COLUMNS}
    keys = np.empty((2 * len(pairs), KEY_BYTES), np.uint8)
    for side, name in enumerate(ID_COLUMNS[1:]):
        keys[side::2] = row_keys(tokens["prompt_ids"], tokens[name])
    numbers = table.column("row").to_numpy() if "row" in places else np.arange(len(pairs))
    sources = table.column("source") if "source" in places else None
    return PairAnswers(tokens, keys, unique_keys(keys)[0], numbers, sources)


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
