"""Shows a pair as the model sees it: which tokens are masked, shared, scored or cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from dpofast.data.prefix import common_prefix_length
from dpofast.data.tokens.left_out import reason_left_out
from dpofast.data.tokens.tokenize import split_row
from dpofast.data.tokens.truncate import Cut, LengthLimits
from dpofast.inspect.tokens import CHOSEN, CUT, MASKED, REJECTED, SHARED, TokenPart, token_table


def render_untokenised_pair(
    row: Mapping[str, Any],
    tokenizer: Any,
    *,
    limits: LengthLimits | None = None,
    max_tokens: int = 200,
) -> RenderableType:
    """Tokenise a pair as training would, and render it.

    Args:
        row: a row in the normal form, `load_preferences(...)[i]`.
        tokenizer, limits, max_tokens: see `render_pair`.

    Returns:
        A rich renderable.

    Raises:
        DataError: the row can't be tokenised.
    """
    # Nothing is cut yet: render_pair shows what the cut takes away.
    split = split_row(row, tokenizer)
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
    shown = render_pair(example, tokenizer, limits=limits, max_tokens=max_tokens)
    return Group(shown, *(Text(note, style="yellow") for note in notes))


def render_pair(
    example: Mapping[str, Any],
    tokenizer: Any,
    *,
    limits: LengthLimits | None = None,
    max_tokens: int = 200,
) -> RenderableType:
    """Render a tokenised pair, and what training would cut from it.

    Args:
        example: prompt_ids, chosen_ids and rejected_ids, lists of token ids; optionally `row`, the
            pair's number in the data.
        tokenizer: turns ids into text.
        limits: the options that decide the cut; None cuts nothing.
        max_tokens: most tokens to print of one part; of a longer part, the middle is left out.

    Returns:
        A rich renderable with "|" between tokens and "⏎" for line breaks.
    """
    limits = limits or LengthLimits()
    prompt, chosen, rejected = (
        list(example[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")
    )
    lengths = (len(prompt), len(chosen), len(rejected))
    cut = limits.plan_cut(*lengths)
    kept_chosen = chosen[: len(chosen) - cut.chosen]
    kept_rejected = rejected[: len(rejected) - cut.rejected]
    shared = common_prefix_length(kept_chosen, kept_rejected)
    parts = [
        TokenPart("prompt, cut on the left", CUT, prompt[: cut.prompt]),
        TokenPart("prompt, masked", MASKED, prompt[cut.prompt :]),
        TokenPart("both answers begin", SHARED, kept_chosen[:shared]),
        TokenPart("chosen, scored", CHOSEN, kept_chosen[shared:]),
        TokenPart("chosen, cut", CUT, chosen[len(kept_chosen) :]),
        TokenPart("rejected, scored", REJECTED, kept_rejected[shared:]),
        TokenPart("rejected, cut", CUT, rejected[len(kept_rejected) :]),
    ]
    lines = [_headline(example.get("row"), lengths, shared)]
    if limits.names:
        lines.append(_cut_line(cut, limits))
    if reason := reason_left_out(chosen, rejected, cut):
        lines.append(Text(f"left out of training: {reason}", style="bold yellow"))
    return Group(*lines, token_table(parts, tokenizer, max_tokens))


def _headline(row: Any, lengths: tuple[int, int, int], shared: int) -> Text:
    prompt, chosen, rejected = lengths
    # Pairs that were built by hand have no row number.
    place = "pair" if row is None else f"row {row} (counted from 0)"
    return Text(
        f"{place}: prompt {prompt} tokens, chosen {chosen}, rejected {rejected}; the answers share "
        f"their first {shared}",
        style="bold",
    )


def _cut_line(cut: Cut, limits: LengthLimits) -> Text:
    if not cut.fits or not (cut.prompt or cut.chosen or cut.rejected):
        return Text(f"{limits}: nothing is cut")
    return Text(
        f"{limits}: cut {cut.prompt} tokens of the prompt on its left, {cut.chosen} of chosen and "
        f"{cut.rejected} of rejected on their right",
        style="yellow",
    )
