"""Finds what a chat template doesn't use of the data, and text that it leaves out."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpofast.columns import kind_of_columns
from dpofast.data.reading.messages import (
    Message,
    content_text,
    decode_messages,
    encode_messages,
)
from dpofast.data.reading.normal_form import source_notes
from dpofast.data.reading.records import place_of_row
from dpofast.data.reading.row_error import RowError, shown
from dpofast.data.tokens.render import texts_missing
from dpofast.data.tokens.render_process import RowRenderer
from dpofast.data.tokens.row_parts import part_names, row_parts, with_parts

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]  # of the normal form

_FIRST_ROWS = 20  # rows whose text is looked for in what the template renders
SHAPED_ROWS = 5_000  # rows among which one of each further shape is looked at, too
_TRIED_ROWS = 3  # rows in which a field is left out on trial


def unused_parts(dataset: datasets.Dataset, renderer: RowRenderer) -> tuple[str, ...]:
    """What is in the source of a dataset but not in the texts that are tokenised.

    Args:
        dataset: rows in the normal form.
        renderer: renders with the tokenizer, which is None if the rows are tokenised already.
    Returns:
        Names of columns, and of fields of messages such as "name in messages".
    """
    notes, tokenizer = source_notes(dataset), renderer.tokenizer
    unused = list(notes.unused_columns)
    filled = [c for c in ("tools", "chat_template_kwargs") if _is_filled(dataset, c)]
    if not _is_rendered(dataset, tokenizer):
        return (*unused, *filled, *(f"{name} in messages" for name in notes.message_fields))
    template = _template_text(tokenizer)
    if "tools" in filled and not _names(template, "tools"):
        unused.append("tools")
    if "chat_template_kwargs" in filled:
        given = [json.loads(text) for text in dataset.unique("chat_template_kwargs") if text]
        names = dict.fromkeys(itertools.chain.from_iterable(given))
        unused += [f"{n} in chat_template_kwargs" for n in names if not _names(template, n)]
    fields = [n for n in notes.message_fields if not _changes_texts(dataset, renderer, n)]
    return (*unused, *(f"{name} in messages" for name in fields))


def warn_of_missing_text(dataset: datasets.Dataset, renderer: RowRenderer, name: str) -> bool:
    """Warn once if the template leaves out the text of a message.

    It looks at the first rows, and at the first one of each further shape. Some templates leave
    out earlier thinking on purpose, so this is no error.

    Args:
        dataset: rows in the normal form.
        renderer: renders with the tokenizer.
        name: dataset name.
    Returns:
        Whether it has warned.
    """
    if not _is_rendered(dataset, renderer.tokenizer):
        return False
    for row in _telling_rows(dataset):
        try:
            texts = renderer.texts(row)
        except RowError:  # tokenising the row raises it again, and reports it
            continue
        if missing := texts_missing(_parts(row), texts):
            logger.warning(
                "%s: the chat template leaves out text of the message from %r: %s. Unless the "
                "template is meant to, mend the message or its role, or give another template.",
                place_of_row(row.get("source") or name, row["row"]),
                missing[0]["role"],
                shown(content_text(missing[0].get("content"))),
            )
            return True
    return False


def _telling_rows(dataset: datasets.Dataset) -> Iterator[Row]:
    """The first rows, and those after them whose messages have other roles or fields."""
    seen = set()
    for index, row in enumerate(itertools.islice(dataset, SHAPED_ROWS)):
        if row.get("left_out"):
            continue
        shape = frozenset(
            (m["role"], type(m.get("content")), *m) for part in _parts(row) for m in part
        )
        if index < _FIRST_ROWS or shape not in seen:
            yield row
        seen.add(shape)


def _changes_texts(dataset: datasets.Dataset, renderer: RowRenderer, field: str) -> bool:
    """Whether the texts of a row change if a field is left out of its messages."""
    for row in _rows_with(dataset, field):
        bare = []
        for name, messages in zip(part_names(row), _parts(row), strict=True):
            without = [{k: v for k, v in m.items() if k != field} for m in messages]
            bare.append(encode_messages(without, name))
        try:
            if renderer.texts(row) != renderer.texts(with_parts(row, bare)):
                return True
        except RowError:  # the template needs the field, or refuses the row in any case
            return True
    return False


def _rows_with(dataset: datasets.Dataset, field: str) -> Iterator[Row]:
    """The first rows in which a message has a field."""
    key = json.dumps(field, ensure_ascii=False) + ":"
    has_key = np.zeros(len(dataset), bool)
    columns = kind_of_columns(dataset.column_names).columns
    for chunks in dataset.with_format("arrow")[:].select(columns).columns:
        texts = chunks.combine_chunks()
        parents = np.arange(len(texts))
        while pa.types.is_list(texts.type):  # messages, or the messages of many answers
            parents = parents[pc.list_parent_indices(texts).to_numpy()]
            texts = pc.list_flatten(texts)
        has_key[parents[pc.match_substring(texts, key).to_numpy(zero_copy_only=False)]] = True
    for index in np.flatnonzero(has_key)[:_TRIED_ROWS]:
        yield dataset[int(index)]


def _is_rendered(dataset: datasets.Dataset, tokenizer: Any) -> bool:
    """Whether the rows pass a chat template."""
    if "prompt" not in dataset.column_names:
        return False
    is_text = dataset.features["prompt"] == datasets.Value("string")
    return not is_text and bool(getattr(tokenizer, "chat_template", None))


def _is_filled(dataset: datasets.Dataset, column: str) -> bool:
    return column in dataset.column_names and any(
        value not in (None, "[]", "{}") for value in dataset.unique(column)
    )


def _parts(row: Row) -> list[list[Message]]:
    return [decode_messages(part) for part in row_parts(row)]


def _template_text(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, Mapping) else str(template)


def _names(template: str, name: str) -> bool:
    return bool(re.search(rf"\b{re.escape(name)}\b", template))
