"""Gives each unpaired row the answer to another prompt, which KTO compares with."""

from __future__ import annotations

from itertools import groupby

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpofast.columns import MISMATCHED_COLUMN, UNPAIRED
from dpofast.errors import DataError

PROMPT, ANSWER = UNPAIRED.id_columns


def with_mismatched(
    rows: datasets.Dataset, name: str, max_length: int | None = None
) -> datasets.Dataset:
    """Add the column `mismatched_ids`: the ids of an answer to another prompt.

    It is the answer k rows before the row, and before the first row come the last ones. k is the
    length of the longest run of rows with the same prompt, so it is 1 if each prompt is there once,
    and 2 for pairs that were split. In each run of a dataset, all answers are so used once. Should
    the row k before have the same prompt as well, it is the nearest row before that one with
    another prompt.

    The answers depend on the rows only: not on their order in training, the batch size, the seed or
    the number of ranks. So the reference scores them once.

    Args:
        rows: result of `tokenize_unpaired`.
        name: name of the dataset, used in errors.
        max_length: the most tokens in a prompt and one answer, to which the mismatched answers are
            cut on their right; above the length of each prompt. None for no limit.

    Raises:
        DataError: all rows have the same prompt.
    """
    table = rows.with_format("arrow")[:]
    prompts = _numbers(table[PROMPT])
    sources = mismatched_rows(prompts)
    if sources is None:
        raise DataError(
            f"{name}: all {len(prompts)} rows have the same prompt, and kto compares with answers "
            "to other prompts; add rows with other prompts, or set loss_type: apo_zero_unpaired."
        )
    answers = table[ANSWER].take(pa.array(sources, pa.int64()))
    if max_length is not None:
        answers = _cut(answers, table[PROMPT], max_length)
    return datasets.Dataset(table.append_column(MISMATCHED_COLUMN, answers))


def mismatched_rows(prompts: list[int]) -> list[int] | None:
    """The row whose answer each row gets; None if all prompts are the same.

    Args:
        prompts: a number for each row, the same for the same prompts.
    """
    if len(set(prompts)) < 2:
        return None if prompts else []
    # The rows are a circle, so a run can go on from the last row to the first one. It is cut where
    # a run begins.
    count = len(prompts)
    first = next(row for row in range(count) if prompts[row - 1] != prompts[row])
    circle = prompts[first:] + prompts[:first]
    longest = max(len(list(run)) for _, run in groupby(circle))
    found = []
    for row, prompt in enumerate(prompts):
        source = (row - longest) % count
        while prompts[source] == prompt:
            source = (source - 1) % count
        found.append(source)
    return found


def _cut(answers: pa.ChunkedArray, prompts: pa.ChunkedArray, max_length: int) -> pa.Array:
    """The answers without the tokens that would make a sequence longer than `max_length`."""
    lengths = pc.list_value_length(answers).to_numpy()
    kept = np.minimum(lengths, max_length - pc.list_value_length(prompts).to_numpy())
    places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ids = pc.list_flatten(answers).to_numpy()[places < np.repeat(kept, lengths)]
    offsets = np.concatenate([[0], np.cumsum(kept)])
    return pa.LargeListArray.from_arrays(offsets, ids).cast(answers.type)


def _numbers(prompts: pa.ChunkedArray) -> list[int]:
    """A number for each prompt, the same for the same ones."""
    ids, lengths = (
        column.to_numpy() for column in (pc.list_flatten(prompts), pc.list_value_length(prompts))
    )
    ends = np.cumsum(lengths)
    numbers: dict[bytes, int] = {}
    return [
        numbers.setdefault(ids[end - length : end].tobytes(), len(numbers))
        for end, length in zip(ends, lengths, strict=True)
    ]
