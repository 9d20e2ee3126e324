"""Shows a pair as the model sees it: tokens, what is masked, what is shared, what is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dpofast.data.prefix import common_prefix_length
from dpofast.data.report import IDENTICAL, IDENTICAL_CUT, NO_ROOM
from dpofast.data.tokenize import prepare_row
from dpofast.data.truncate import Cut, check_truncation, plan_cut

_MASKED, _SHARED, _CHOSEN, _REJECTED, _CUT = "dim", "cyan", "green", "red", "dim strike"


@dataclass(frozen=True)
class _Part:
    """A stretch of tokens that is shown in one style."""

    title: str
    style: str
    ids: Sequence[int]


def render_row(
    row: Mapping[str, Any],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    max_tokens: int = 200,
) -> RenderableType:
    """Show one row of the normal form (`load_preferences(...)[i]`) as training would take it.

    Takes and raises what `render_pair` does; also DataError where the row can't be tokenised.
    """
    split, _ = prepare_row(row, tokenizer, max_length=max_length, truncation_mode=truncation_mode)
    example = {
        "row": row.get("row"),
        "prompt_ids": split.prompt_ids,
        "chosen_ids": split.chosen_ids,
        "rejected_ids": split.rejected_ids,
    }
    notes = []
    if split.merged:
        notes.append("the tokenizer merges prompt and answer: the answer was tokenised by itself")
    if split.rerendered:
        notes.append(
            "the chat template renders the prompt otherwise before an answer than alone: it ends "
            "where they part"
        )
    shown = render_pair(
        example,
        tokenizer,
        max_length=max_length,
        truncation_mode=truncation_mode,
        max_tokens=max_tokens,
    )
    return Group(shown, *(Text(note, style="yellow") for note in notes))


def render_pair(
    example: Mapping[str, Any],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    max_tokens: int = 200,
) -> RenderableType:
    """Show a tokenised pair, and what `max_length` would cut from it.

    Args:
        example: prompt_ids, chosen_ids and rejected_ids as lists of token ids, and `row`, if known.
        tokenizer: turns ids into text.
        max_length: most tokens of a prompt and one answer, None for no limit.
        truncation_mode: keep_start or keep_end.
        max_tokens: of a longer part, the first and last tokens are shown, this many in all.
    Returns:
        A rich renderable: tokens are parted by "|", line breaks shown as "⏎".
    Raises:
        ConfigError: max_length or truncation_mode can't be used.
    """
    check_truncation(max_length, truncation_mode)
    prompt, chosen, rejected = (
        list(example[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")
    )
    lengths = (len(prompt), len(chosen), len(rejected))
    cut = plan_cut(*lengths, max_length, truncation_mode)
    kept_chosen = chosen[: len(chosen) - cut.chosen]
    kept_rejected = rejected[: len(rejected) - cut.rejected]
    shared = common_prefix_length(kept_chosen, kept_rejected)
    parts = [
        _Part("prompt, cut on the left", _CUT, prompt[: cut.prompt]),
        _Part("prompt, masked", _MASKED, prompt[cut.prompt :]),
        _Part("both answers begin", _SHARED, kept_chosen[:shared]),
        _Part("chosen, scored", _CHOSEN, kept_chosen[shared:]),
        _Part("chosen, cut", _CUT, chosen[len(kept_chosen) :]),
        _Part("rejected, scored", _REJECTED, kept_rejected[shared:]),
        _Part("rejected, cut", _CUT, rejected[len(kept_rejected) :]),
    ]
    table = Table.grid(padding=(0, 1))
    for part in parts:
        if part.ids:
            title = Text(f"{part.title} ({len(part.ids)})", style="bold")
            table.add_row(title, _tokens(part, tokenizer, max_tokens))
    lines = [_headline(example.get("row"), lengths, shared)]
    if max_length is not None:
        lines.append(_cut_line(cut, max_length, truncation_mode))
    if reason := _left_out(cut, chosen == rejected, kept_chosen == kept_rejected):
        lines.append(Text(f"left out of training: {reason}", style="bold yellow"))
    return Group(*lines, table)


def _headline(row: Any, lengths: tuple[int, int, int], shared: int) -> Text:
    prompt, chosen, rejected = lengths
    place = "pair" if row is None else f"row {row} (counted from 0)"
    return Text(
        f"{place}: prompt {prompt} tokens, chosen {chosen}, rejected {rejected}; the answers share "
        f"their first {shared}",
        style="bold",
    )


def _cut_line(cut: Cut, max_length: int, truncation_mode: str) -> Text:
    limit = f"max_length {max_length}, {truncation_mode}"
    if not cut.fits or not (cut.prompt or cut.chosen or cut.rejected):
        return Text(f"{limit}: nothing is cut")
    return Text(
        f"{limit}: cut {cut.prompt} tokens of the prompt on its left, {cut.chosen} of chosen and "
        f"{cut.rejected} of rejected on their right",
        style="yellow",
    )


def _left_out(cut: Cut, identical: bool, identical_after_cut: bool) -> str | None:
    if identical:
        return IDENTICAL
    if not cut.fits:
        return NO_ROOM
    return IDENTICAL_CUT if identical_after_cut else None


def _tokens(part: _Part, tokenizer: Any, max_tokens: int) -> Text:
    ids = part.ids
    head, tail = ids, ids[:0]
    if len(ids) > max_tokens:
        head, tail = ids[: max_tokens - max_tokens // 2], ids[len(ids) - max_tokens // 2 :]
    text = _joined(head, part.style, tokenizer)
    if hidden := len(ids) - len(head) - len(tail):
        text.append(f" ... {hidden} tokens ... ", style="italic")
        text.append_text(_joined(tail, part.style, tokenizer))
    return text


def _joined(ids: Sequence[int], style: str, tokenizer: Any) -> Text:
    text = Text()
    for index, token in enumerate(ids):
        if index:
            text.append("|", style="dim")
        shown = tokenizer.decode([token], skip_special_tokens=False)
        text.append(shown.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥"), style=style)
    return text
