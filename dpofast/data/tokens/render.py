"""The texts of a pair: chat templates applied, EOS put after plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from dpofast.data.reading.messages import to_template
from dpofast.data.reading.row_error import RowError
from dpofast.data.tokens.boundary import PairTexts

# What a template's own code raises on messages that it wasn't written for.
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def render_pair_texts(row: Mapping[str, Any], tokenizer: Any) -> tuple[PairTexts, bool]:
    """The texts to tokenise, and whether they are plain text rather than a rendered template.

    Raises:
        RowError: the tokenizer lacks a chat template or an EOS token that the row needs, or its
            template refuses the row.
    """
    if isinstance(row["prompt"], str):
        return _plain(row["prompt"], row["chosen"], row["rejected"], tokenizer), True
    if tokenizer.chat_template:
        return _templated(row, tokenizer), False
    if row.get("plain_prompt") is None:
        raise RowError(
            "the data are messages, but the tokenizer has no chat template; give it one "
            "(tokenizer.chat_template, or a file chat_template.jinja beside it) or give the data "
            "as text"
        )
    answers = (row["chosen"][0]["content"], row["rejected"][0]["content"])
    return _plain(row["plain_prompt"], *answers, tokenizer), True


def _plain(prompt: str, chosen: str, rejected: str, tokenizer: Any) -> PairTexts:
    eos = tokenizer.eos_token
    if not eos:
        raise RowError(
            "the tokenizer has no EOS token, so nothing would teach where an answer ends; set "
            "tokenizer.eos_token"
        )
    # A text that was rendered before may have a line break after its own EOS.
    wholes = [
        prompt + answer + ("" if answer.rstrip().endswith(eos) else eos)
        for answer in (chosen, rejected)
    ]
    return PairTexts(prompt, *wholes)


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
        )
    except _TEMPLATE_ERRORS as error:
        reason = " ".join(str(error).split())
        raise RowError(
            f"the tokenizer's chat template can't render the messages: {reason}; mend the "
            "messages or give another template"
        ) from None
