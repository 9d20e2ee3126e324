"""The normal form, to which preference pairs of every format are brought: a `datasets.Dataset`.

It has these columns:

- prompt, chosen and rejected: all text, or all lists of messages. A message is a JSON text, so that
  its fields, their order and their nulls stay as they were written.
- prompt_ids, chosen_ids and rejected_ids in their place, if the source is tokenised already.
- completion in place of chosen and rejected, or completion_ids, and label, a bool, if the data is
  unpaired.
- completions in place of chosen and rejected, or completions_ids, a list of answers to the prompt;
  pairs, a list of [chosen, rejected], places in that list; ties, the pairs that equal scores leave
  unmade; and places, the place of each answer in the source's list, if the rows are ranked. Every
  answer there is in a pair, and none is empty.
- row: the row's index in the source, counted from 0. Pairs from one row share it.
- source: the data set that the row comes from, if several were mixed.
- left_out: why the row is left out, null for a pair that is used; the column is only there if a row
  is left out. Such a row has no pair. A pair of a ranked row that is left out is a row of its own.
- problem: place of a row that was left out because it can't be used, and what is wrong with it.
- If the source has them: tools and chat_template_kwargs, as JSON; ref_chosen_logps and
  ref_rejected_logps, in nats; weight and label_confidence; and plain_prompt, the prompt of an
  instruction row for tokenizers without a chat template. In a mixture weight and label_confidence
  are null in rows of datasets that don't have them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import pyarrow as pa

from dpofast.columns import (
    LABEL_COLUMN,
    PAIRED,
    PAIRS_COLUMN,
    PLACES_COLUMN,
    REF_COLUMNS,
    TIES_COLUMN,
    WEIGHT_COLUMNS,
    RowKind,
)

# A Dataset whose description begins with this line is in the normal form. Selecting rows keeps the
# description. What else is known about the source follows, as JSON.
_MARK = "Preference pairs in dpofast's normal form, version 2."

OPTIONAL_TYPES: dict[str, pa.DataType] = {
    "source": pa.string(),
    "left_out": pa.string(),
    "problem": pa.string(),
    "tools": pa.string(),
    "chat_template_kwargs": pa.string(),
    "plain_prompt": pa.string(),
    **dict.fromkeys((*REF_COLUMNS, *WEIGHT_COLUMNS), pa.float64()),
}


def answer_types(kind: RowKind) -> dict[str, dict[str, pa.DataType]]:
    """Type of the prompt and the answers ("text", "messages" or "ids") -> types of the columns."""
    text, messages, ids = pa.string(), pa.list_(pa.string()), pa.list_(pa.int32())
    others: dict[str, pa.DataType] = {LABEL_COLUMN: pa.bool_()} if kind.labelled else {}
    if kind.many:
        numbers = pa.list_(pa.int32())
        others = {PAIRS_COLUMN: pa.list_(numbers), TIES_COLUMN: pa.int32(), PLACES_COLUMN: numbers}

    def types(columns: tuple[str, ...], part: pa.DataType) -> dict[str, pa.DataType]:
        prompt, *answers = columns
        answer = pa.list_(part) if kind.many else part
        return {prompt: part, **dict.fromkeys(answers, answer), **others}

    return {
        "text": types(kind.columns, text),
        "messages": types(kind.columns, messages),
        "ids": types(kind.id_columns, ids),
    }


@dataclass(frozen=True, slots=True)
class SourceNotes:
    """What was seen in a source and isn't in its pairs.

    Attributes:
        unused_columns: columns that hold values but that no pair was made from.
        message_fields: fields that messages have besides role and content.
        nulls_left_out: whether nulls in structs of Arrow were left out.
        answer_pairs: which pairs were made of ranked rows.
    """

    unused_columns: tuple[str, ...] = ()
    message_fields: tuple[str, ...] = ()
    nulls_left_out: bool = False
    answer_pairs: tuple[str, ...] = ()

    def merged(self, other: SourceNotes) -> SourceNotes:
        """The notes on two sources that are read together."""
        columns = dict.fromkeys((*self.unused_columns, *other.unused_columns))
        fields = dict.fromkeys((*self.message_fields, *other.message_fields))
        nulls = self.nulls_left_out or other.nulls_left_out
        made = dict.fromkeys((*self.answer_pairs, *other.answer_pairs))
        return SourceNotes(tuple(columns), tuple(fields), nulls, tuple(made))


def normal_form(table: pa.Table, notes: SourceNotes) -> datasets.Dataset:
    """A Dataset that is recognised as being in the normal form."""
    description = f"{_MARK}\n{json.dumps(asdict(notes))}"
    return datasets.Dataset(table, info=datasets.DatasetInfo(description=description))


def is_normal_form(source: Any, kind: RowKind = PAIRED) -> bool:
    """Whether `source` is a result of `load_preferences`, or a selection of its rows.

    Args:
        source: anything.
        kind: RANKED asks for rows with many answers, UNPAIRED for a result of `load_unpaired`.
    """
    if not isinstance(source, datasets.Dataset) or not source.info.description.startswith(_MARK):
        return False
    # `map` keeps the description as well, so the columns have to be right, too.
    names = set(source.column_names)
    known = {"row", *OPTIONAL_TYPES}
    return any(set(types) <= names <= known | set(types) for types in answer_types(kind).values())


def source_notes(dataset: datasets.Dataset) -> SourceNotes:
    """The notes on the source of a Dataset in the normal form."""
    notes = SourceNotes()
    # `datasets.concatenate_datasets` joins descriptions that differ.
    for part in dataset.info.description.split(_MARK)[1:]:
        values: Mapping[str, Any] = json.JSONDecoder().raw_decode(part.lstrip())[0]
        columns, fields = (tuple(values[name]) for name in ("unused_columns", "message_fields"))
        made = tuple(values.get("answer_pairs", ()))  # not in data that older versions saved
        notes = notes.merged(SourceNotes(columns, fields, values["nulls_left_out"], made))
    return notes
