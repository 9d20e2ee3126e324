"""Shows a row as the model sees it: which tokens are masked, shared, scored or cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from dpofast.columns import LABEL_COLUMN, RowKind, kind_of_columns
from dpofast.data.prefix import common_prefix_length
from dpofast.data.tokens.left_out import reason_left_out
from dpofast.data.tokens.tokenize import split_row
from dpofast.data.tokens.truncate import Cut, LengthLimits
from dpofast.inspect.ranked import render_ranked
from dpofast.inspect.tokens import (
    CHOSEN,
    CUT,
    MASKED,
    REJECTED,
    SHARED,
    TokenPart,
    shared_beginning,
    token_table,
)


def render_untokenised_pair(
    row: Mapping[str, Any],
    tokenizer: Any,
    *,
    limits: LengthLimits | None = None,
    max_tokens: int = 200,
) -> RenderableType:
    """Tokenise a pair, an unpaired row or a ranked row as training would, and render it.

    Args:
        row: a row in the normal form, `load_preferences(...)[i]` or `load_unpaired(...)[i]`.
        tokenizer, limits, max_tokens: see `render_pair`.

    Returns:
        A rich renderable.

    Raises:
        DataError: the row can't be tokenised.
    """
    # Nothing is cut yet: render_pair shows what the cut takes away.
    split = split_row(row, tokenizer)
    notes = []
    if split.merged:
        notes.append("the tokenizer merges prompt and answer: the answer was tokenised by itself")
    if split.rerendered:
        notes.append(
            "the chat template renders the prompt otherwise before an answer than alone: it ends "
            "where they part"
        )
    kind = kind_of_columns(row)
    if kind.many:
        shown = render_ranked(row, split.ids, tokenizer, limits=limits, max_tokens=max_tokens)
    else:
        example = {
            "row": row.get("row"),
            LABEL_COLUMN: row.get(LABEL_COLUMN),
            **dict(zip(kind.id_columns, split.ids, strict=True)),
        }
        shown = render_pair(example, tokenizer, limits=limits, max_tokens=max_tokens)
    return Group(shown, *(Text(note, style="yellow") for note in notes))


def render_pair(
    example: Mapping[str, Any],
    tokenizer: Any,
    *,
    limits: LengthLimits | None = None,
    max_tokens: int = 200,
) -> RenderableType:
    """Render a tokenised pair or unpaired row, and what training would cut from it.

    Args:
        example: prompt_ids, chosen_ids and rejected_ids, lists of token ids; or prompt_ids,
            completion_ids and the label. Optionally `row`, its number in the data.
        tokenizer: turns ids into text.
        limits: the options that decide the cut; None cuts nothing.
        max_tokens: most tokens to print of one part; of a longer part, the middle is left out.

    Returns:
        A rich renderable with "|" between tokens and "⏎" for line breaks.
    """
    limits = limits or LengthLimits()
    kind = kind_of_columns(example)
    prompt, *answers = (list(example[column]) for column in kind.id_columns)
    cut = limits.plan_cut(len(prompt), *map(len, answers))
    _, *kept = cut.apply(prompt, *answers)
    shared = common_prefix_length(*kept) if len(kept) == 2 else 0
    parts = [
        TokenPart("prompt, cut on the left", CUT, prompt[: cut.prompt]),
        TokenPart("prompt, masked", MASKED, prompt[cut.prompt :]),
        TokenPart("both answers begin", SHARED, kept[0][:shared]),
    ]
    for name, style, answer, rest in zip(
        kind.answers, _styles(example), answers, kept, strict=True
    ):
        parts.append(TokenPart(f"{name}, scored", style, rest[shared:]))
        parts.append(TokenPart(f"{name}, cut", CUT, answer[len(rest) :]))
    lines = [_headline(example, kind, shared)]
    if limits.names:
        lines.append(_cut_line(cut, limits, kind))
    if reason := reason_left_out(answers, cut):
        lines.append(Text(f"left out of training: {reason}", style="bold yellow"))
    return Group(*lines, token_table(parts, tokenizer, max_tokens))


def _styles(example: Mapping[str, Any]) -> Sequence[str]:
    """The style of each answer; a desirable one is shown as a chosen one is."""
    if not kind_of_columns(example).labelled:
        return CHOSEN, REJECTED
    return (CHOSEN if example[LABEL_COLUMN] else REJECTED,)


def _headline(example: Mapping[str, Any], kind: RowKind, shared: int) -> Text:
    row, (prompt, *answers) = example.get("row"), (len(example[c]) for c in kind.id_columns)
    # Rows that were built by hand have no number.
    place = kind.noun if row is None else f"row {row} (counted from 0)"
    sizes = ", ".join(f"{name} {n}" for name, n in zip(kind.answers, answers, strict=True))
    if kind.labelled:
        rest = "desirable" if example[LABEL_COLUMN] else "undesirable"
    else:
        rest = shared_beginning(shared)
    return Text(f"{place}: prompt {prompt} tokens, {sizes}; {rest}", style="bold")


def _cut_line(cut: Cut, limits: LengthLimits, kind: RowKind) -> Text:
    if not cut.fits or not any((cut.prompt, *cut.answers)):
        return Text(f"{limits}: nothing is cut")
    of = " and ".join(f"{n} of {name}" for name, n in zip(kind.answers, cut.answers, strict=True))
    whose = "their" if len(cut.answers) > 1 else "its"
    return Text(
        f"{limits}: cut {cut.prompt} tokens of the prompt on its left, {of} on {whose} right",
        style="yellow",
    )
