"""Turns a pair into the texts to tokenise: applies the chat template, or adds EOS to plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from dpofast.data.reading.messages import to_template
from dpofast.data.reading.row_error import RowError
from dpofast.data.tokens.boundary import PairTexts
from dpofast.errors import one_line

# Jinja runs the template's own expressions, so a template raises almost anything on messages that
# it wasn't written for.
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def render_pair_texts(row: Mapping[str, Any], tokenizer: Any) -> PairTexts:
    """The texts of one row of the normal form that are to be tokenised.

    Raises:
        RowError: the row needs a chat template or an EOS token that the tokenizer doesn't have, or
            the template refuses the row.
    """
    if isinstance(row["prompt"], str):
        return _plain(row["prompt"], row["chosen"], row["rejected"], tokenizer)
    if tokenizer.chat_template:
        return _templated(row, tokenizer)
    if row.get("plain_prompt") is None:
        raise RowError(
            "the data are messages, but the tokenizer has no chat template; give it one "
            "(tokenizer.chat_template, or a file chat_template.jinja beside it) or give the data "
            "as text"
        )
    answers = (row["chosen"][0]["content"], row["rejected"][0]["content"])
    return _plain(row["plain_prompt"], *answers, tokenizer)


def _plain(prompt: str, chosen: str, rejected: str, tokenizer: Any) -> PairTexts:
    eos = tokenizer.eos_token
    if not eos:
        raise RowError(
            "the tokenizer has no EOS token, so nothing would teach where an answer ends; set "
            "tokenizer.eos_token"
        )
    # A text that a chat template made elsewhere can have a line break after its EOS.
    with_chosen, with_rejected = (
        prompt + answer + ("" if answer.rstrip().endswith(eos) else eos)
        for answer in (chosen, rejected)
    )
    return PairTexts(prompt, with_chosen, with_rejected)


def _templated(row: Mapping[str, Any], tokenizer: Any) -> PairTexts:
    options = json.loads(row.get("chat_template_kwargs") or "{}")
    options["tools"] = json.loads(row.get("tools") or "null")
    prompt = [to_template(message) for message in row["prompt"]]
    chosen = [to_template(message) for message in row["chosen"]]
    rejected = [to_template(message) for message in row["rejected"]]

    def render(messages: list[dict[str, Any]], **kwargs: Any) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options, **kwargs)
        return text

    try:
        return PairTexts(
            render(prompt, add_generation_prompt=True),
            render(prompt + chosen),
            render(prompt + rejected),
            rendered=True,
        )
    except _TEMPLATE_ERRORS as error:
        raise RowError(
            f"the tokenizer's chat template can't render the messages: {one_line(error)}; mend the "
            "messages or give another template"
        ) from None
