"""Finds what a chat template doesn't use of the data, and text that it leaves out."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping
from typing import Any

import datasets

from dpofast.data.reading.messages import content_text, decode_messages
from dpofast.data.reading.normal_form import source_notes
from dpofast.data.reading.records import place_of_row
from dpofast.data.reading.row_error import RowError, shown
from dpofast.data.tokens.render import render_pair_texts, texts_missing

logger = logging.getLogger(__name__)

_FIRST_ROWS = 20  # rows whose text is looked for in what the template renders
# A template that writes a whole message as JSON, or goes through its fields, uses all of them.
# transformers gives a template any of these fields under the name that it reads.
_REASONING = {"reasoning_content", "reasoning", "thinking"}
_WHOLE_MESSAGE = re.compile(r"\b(m|msg|message)\s*\|\s*tojson|\b(m|msg|message)\.items\(\)")


def unused_parts(dataset: datasets.Dataset, tokenizer: Any) -> tuple[str, ...]:
    """What is in the source of a dataset but not in the texts that are tokenised.

    Args:
        dataset: pairs in the normal form.
        tokenizer: the tokenizer; None if the pairs are tokenised already.
    Returns:
        Names of columns, and of fields of messages such as "name in messages".
    """
    notes = source_notes(dataset)
    unused = list(notes.unused_columns)
    options = [c for c in ("tools", "chat_template_kwargs") if _is_filled(dataset, c)]
    if "prompt" not in dataset.column_names:
        return (*unused, *options)
    template = _template_text(tokenizer)
    is_text = dataset.features["prompt"] == datasets.Value("string")
    if is_text or not template:  # no template is applied
        return (*unused, *options, *(f"{name} in messages" for name in notes.message_fields))
    if "tools" in options and "tools" not in template:
        unused.append("tools")
    if not _WHOLE_MESSAGE.search(template):
        unused += [
            f"{name} in messages"
            for name in notes.message_fields
            if not any(n in template for n in (_REASONING if name in _REASONING else {name}))
        ]
    return tuple(unused)


def _is_filled(dataset: datasets.Dataset, column: str) -> bool:
    return column in dataset.column_names and any(
        value not in (None, "[]", "{}") for value in dataset.unique(column)
    )


def _template_text(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(template.values()) if isinstance(template, Mapping) else str(template)


def warn_of_missing_text(dataset: datasets.Dataset, tokenizer: Any, name: str) -> None:
    """Warn once if the template leaves out the text of a message, in one of the first rows.

    Some templates leave out earlier thinking on purpose, so this is no error.

    Args:
        dataset: pairs in the normal form.
        tokenizer: the tokenizer.
        name: dataset name.
    """
    if not getattr(tokenizer, "chat_template", None) or "prompt" not in dataset.column_names:
        return
    for row in itertools.islice(dataset, _FIRST_ROWS):
        if row.get("left_out") or isinstance(row["prompt"], str):
            continue
        try:
            texts = render_pair_texts(row, tokenizer)
        except RowError:  # tokenising the row raises it again, and reports it
            continue
        parts = [decode_messages(row[column]) for column in ("prompt", "chosen", "rejected")]
        if missing := texts_missing(parts, texts):
            logger.warning(
                "%s: the chat template leaves out text of the message from %r: %s. Unless the "
                "template is meant to, mend the message or its role, or give another template.",
                place_of_row(row.get("source") or name, row["row"]),
                missing[0]["role"],
                shown(content_text(missing[0].get("content"))),
            )
            return
