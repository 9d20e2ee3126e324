"""A dataset's answers as the store sees them: token ids, keys, and names for messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dpofast.columns import ID_COLUMNS
from dpofast.errors import DataError
from dpofast.reference.store.keys import TokenLists, row_keys, unique_keys

if TYPE_CHECKING:
    from datasets import Dataset

SIDES = ("chosen", "rejected")
READ_ROWS = 10_000


@dataclass(frozen=True)
class PairAnswers:
    """The answers of n pairs, in the order chosen_0, rejected_0, chosen_1, ...

    Attributes:
        tokens: by column, `prompt_ids`, `chosen_ids` and `rejected_ids`; n lists each.
        keys: [2n, 16] uint8.
        first: [u] int64, where each different answer stands first.
        source_rows: [n] int64, of the pairs in their source.
    """

    tokens: dict[str, TokenLists]
    keys: np.ndarray
    first: np.ndarray
    source_rows: np.ndarray

    def ids(self, answer: int) -> tuple[list[int], list[int]]:
        """Prompt and answer ids of one of the 2n answers."""
        pair, side = divmod(answer, 2)
        prompt = self.tokens["prompt_ids"][pair]
        return prompt.tolist(), self.tokens[ID_COLUMNS[1 + side]][pair].tolist()

    def lengths(self, answers: np.ndarray) -> np.ndarray:
        """Tokens of prompt and answer, for each of these answers: [m] -> [m] int64."""
        pairs, sides = np.divmod(answers, 2)
        of_answer = np.stack([self.tokens[name].lengths for name in ID_COLUMNS[1:]])  # [2, n]
        lengths: np.ndarray = self.tokens["prompt_ids"].lengths[pairs] + of_answer[sides, pairs]
        return lengths

    def prompts(self, answers: np.ndarray) -> np.ndarray:
        """A number for the prompt of each of these answers [m] int64, equal for equal prompts."""
        prompt_ids = self.tokens["prompt_ids"]
        numbers: dict[bytes, int] = {}
        found = [
            numbers.setdefault(prompt_ids[pair].tobytes(), len(numbers))
            for pair in (answers // 2).tolist()
        ]
        return np.array(found, np.int64)

    def name(self, answer: int) -> str:
        pair, side = divmod(answer, 2)
        return f"row {self.source_rows[pair]} ({SIDES[side]})"


def read_answers(pairs: Dataset) -> PairAnswers:
    """Read a tokenised dataset.

    Args:
        pairs: columns prompt_ids, chosen_ids, rejected_ids; an optional int `row` names the pairs.

    Raises:
        DataError: a column lacks, doesn't hold lists of ints, or a row of it is null.
    """
    missing = [name for name in ID_COLUMNS if name not in pairs.column_names]
    if missing:
        raise DataError(
            f"The dataset has no column {missing[0]!r}: reference log-probs are made of tokenised "
            f"pairs ({', '.join(ID_COLUMNS)}), see tokenize_preferences."
        )
    has_rows = "row" in pairs.column_names
    chosen = pairs.select_columns([*ID_COLUMNS, *(["row"] if has_rows else [])])
    batches = chosen.with_format("arrow").iter(READ_ROWS)
    table = pa.concat_tables(batches) if len(pairs) else chosen.data.table
    tokens = {name: _token_lists(table.column(name), name) for name in ID_COLUMNS}
    keys = np.empty((2 * len(pairs), 16), np.uint8)
    for side, name in enumerate(ID_COLUMNS[1:]):
        keys[side::2] = row_keys(tokens["prompt_ids"], tokens[name])
    source = table.column("row").to_numpy() if has_rows else np.arange(len(pairs))
    return PairAnswers(tokens, keys, unique_keys(keys)[0], source)


def _token_lists(column: pa.ChunkedArray, name: str) -> TokenLists:
    try:
        offsets: Any = pa.compute.list_value_length(column)
        values: Any = pa.compute.list_flatten(column)
        ids = values.cast(pa.int64())
    except (pa.ArrowInvalid, NotImplementedError) as error:
        raise DataError(
            f"The column {name!r} holds {column.type}, expected lists of token ids."
        ) from error
    if column.null_count or ids.null_count:
        bad = np.flatnonzero([None in (row or [None]) for row in column.to_pylist()])[0]
        raise DataError(f"Row {bad} of the column {name!r} has no token ids, or a null among them.")
    lengths = offsets.to_numpy()
    return TokenLists(ids.to_numpy(), np.cumsum(np.concatenate([[0], lengths]), dtype=np.int64))
