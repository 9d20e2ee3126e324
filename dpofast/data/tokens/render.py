"""Turns a row into the texts to tokenise: applies the chat template, or adds EOS to plain text."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from dpofast.data.reading.messages import Message, content_text, decode_messages
from dpofast.data.reading.row_error import RowError
from dpofast.data.tokens.boundary import RowTexts
from dpofast.data.tokens.row_parts import part_names, row_parts
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

Render = Callable[[list[list[Message]]], RowTexts]


class TokenizerError(RowError):
    """A fault of the tokenizer, which every other row would meet as well."""


def render_row_texts(row: Mapping[str, Any], tokenizer: Any) -> RowTexts:
    """The texts of one row of the normal form that are to be tokenised.

    Raises:
        TokenizerError: the row needs a chat template or an EOS token that the tokenizer doesn't
            have.
        RowError: the template refuses the row, or writes a content as Python writes it.
    """
    given = row_parts(row)
    if isinstance(row["prompt"], str):
        return _plain(*given, tokenizer=tokenizer)
    parts = [decode_messages(part) for part in given]
    if tokenizer.chat_template:
        return _templated(parts, _renderer(row, tokenizer), part_names(row)[1:])
    if row.get("plain_prompt") is None:
        raise TokenizerError(
            "the data are messages, but the tokenizer has no chat template; give it one "
            "(tokenizer.chat_template in Python, chat_template on the command line and in YAML, or "
            "a file chat_template.jinja beside it) or give the data as text"
        )
    answers = (content_text(answer[0]["content"]) for answer in parts[1:])
    return _plain(row["plain_prompt"], *answers, tokenizer=tokenizer)


def _plain(prompt: str, *answers: str, tokenizer: Any) -> RowTexts:
    eos = tokenizer.eos_token
    if not eos:
        raise TokenizerError(
            "the tokenizer has no EOS token, so nothing would teach where an answer ends; set "
            "tokenizer.eos_token"
        )
    # A text that a chat template made elsewhere can have a line break after its EOS.
    wholes = (prompt + a + ("" if a.rstrip().endswith(eos) else eos) for a in answers)
    return RowTexts(prompt, tuple(wholes))


def _renderer(row: Mapping[str, Any], tokenizer: Any) -> Render:
    """A function that renders the prompt and the answers with the options of a row."""
    options = json.loads(row.get("chat_template_kwargs") or "{}")
    options["tools"] = json.loads(row.get("tools") or "null")

    def render(messages: list[Message], **kwargs: Any) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options, **kwargs)
        return text

    def render_row(parts: list[list[Message]]) -> RowTexts:
        prompt, *answers = parts
        return RowTexts(
            render(prompt, add_generation_prompt=True),
            tuple(render(prompt + answer) for answer in answers),
            rendered=True,
        )

    return render_row


def _templated(parts: list[list[Message]], render: Render, names: Sequence[str]) -> RowTexts:
    """Render a row's messages.

    Args:
        parts: messages of the prompt and of each answer.
        render: renders them.
        names: names of the answers, used in errors.
    """
    try:
        if any(isinstance(m.get("content"), list) for part in parts for m in part):
            texts = _with_blocks(parts, render)
        else:
            texts = _without_none(parts, render)
        _refuse_unwritten_answers(parts, texts, render, names)
        return texts
    except _TEMPLATE_ERRORS as error:
        raise RowError(
            f"the tokenizer's chat template can't render the messages: {one_line(error)}; mend the "
            "messages or give another template"
        ) from None


def _with_blocks(parts: list[list[Message]], render: Render) -> RowTexts:
    """Render messages whose content is a list of blocks; they become text if that is needed.

    A template that wants text either fails on a list, writes it as Python does, or leaves it out.
    """
    # A template that wants text would write an empty list as "[]".
    parts = [[{**m, "content": ""} if m.get("content") == [] else m for m in p] for p in parts]
    try:
        texts = _without_none(parts, render)
    except _TEMPLATE_ERRORS:
        texts = None
    if texts is not None and _blocks_as_python(parts, texts):
        texts = None
    if texts is not None and not texts_missing(parts, texts):
        return texts
    flat = _blocks_to_text(parts)
    flat_texts = _without_none(flat, render)
    # Some text is missing either way, so the blocks aren't the reason.
    return texts if texts is not None and texts_missing(flat, flat_texts) else flat_texts


def _without_none(parts: list[list[Message]], render: Render) -> RowTexts:
    """Render messages, and refuse a content of null that the template writes as "None".

    Newer versions of transformers leave such a content out before they render.
    """
    texts = render(parts)
    if not any(m.get("content", "") is None for part in parts for m in part):
        return texts
    if not any("None" in whole for whole in texts.wholes):
        return texts
    # The word can be in another message, so the texts are compared with those of empty contents.
    empty = render([[{**m, "content": m.get("content") or ""} for m in part] for part in parts])
    for whole, other in zip(texts.wholes, empty.wholes, strict=True):
        if whole.count("None") > other.count("None"):
            raise RowError(
                "the chat template writes the content of a message, which is null, as 'None'; "
                'give the message a text, or "" as content'
            )
    return texts


def _refuse_unwritten_answers(
    parts: list[list[Message]], texts: RowTexts, render: Render, names: Sequence[str]
) -> None:
    """Refuse an answer of which the template writes nothing, such as calls that it doesn't know.

    Raises:
        RowError: there is such an answer.
    """
    prompt, *answers = parts
    if all(any(content_text(m.get("content")).strip() for m in answer) for answer in answers):
        return
    bare = [[{"role": m["role"], "content": ""} for m in answer] for answer in answers]
    unwritten = render([prompt, *bare]).wholes
    for column, answer, *both in zip(names, answers, texts.wholes, unwritten, strict=True):
        if not any(content_text(m.get("content")).strip() for m in answer) and both[0] == both[1]:
            fields = sorted({name for m in answer for name in m} - {"role", "content"})
            raise RowError(
                f"{column} has no text, and the chat template doesn't write its "
                f"{', '.join(fields)}; give another template, or remove the row"
            )


def texts_missing(parts: list[list[Message]], texts: RowTexts) -> list[Message]:
    """The messages whose text isn't in the rendered texts.

    White space and upper case don't count. A text is looked for as it is, as JSON writes it, and
    with the entities of HTML.
    """
    prompt, *answers = parts
    missing = []
    for answer, whole in zip(answers, texts.wholes, strict=True):
        rest = _plain_letters(html.unescape(whole))
        texts_of_all = [(text, each) for each in (*prompt, *answer) for text in _texts(each)]
        # Each text takes its place, so that a short one isn't found within a longer one.
        for text, message in sorted(texts_of_all, key=lambda pair: len(pair[0]), reverse=True):
            forms = (text, *(json.dumps(text, ensure_ascii=a)[1:-1] for a in (False, True)))
            found = [form for form in map(_plain_letters, forms) if form in rest]
            if found:
                rest = rest.replace(found[0], "\0", 1) if found[0] else rest
            elif message not in missing:
                missing.append(message)
    return missing


def _texts(message: Message) -> list[str]:
    """The text of a message, or those of its blocks."""
    content = message.get("content")
    return [b["text"] for b in content] if isinstance(content, list) else [content or ""]


def _plain_letters(text: str) -> str:
    return "".join(text.casefold().split())


def _blocks_as_python(parts: list[list[Message]], texts: RowTexts) -> bool:
    """Whether a block is in the rendered texts as Python writes it, such as {'type': 'text', ...}.

    The blocks aren't passed as objects that notice this, because transformers copies messages to
    plain lists and dicts before it renders them.
    """
    wholes = [_plain_letters(html.unescape(whole)) for whole in texts.wholes]
    return any(
        _plain_letters(str(block)) in whole
        for part in parts
        for message in part
        if isinstance(message.get("content"), list)
        for block in message["content"]
        for whole in wholes
    )


def _blocks_to_text(parts: list[list[Message]]) -> list[list[Message]]:
    def as_text(message: Message) -> Message:
        if not isinstance(message.get("content"), list):
            return message
        return {**message, "content": content_text(message["content"])}

    return [[as_text(message) for message in part] for part in parts]
