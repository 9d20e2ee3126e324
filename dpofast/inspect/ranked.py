"""Shows a row with many answers as the model sees it: each answer once, and the pairs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from dpofast.columns import PAIRS_COLUMN, PLACES_COLUMN, TIES_COLUMN
from dpofast.data.prefix import common_prefix_length
from dpofast.data.tokens.left_out import reason_left_out
from dpofast.data.tokens.truncate import Cut, LengthLimits
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

_BOTH = "yellow"  # the style of an answer that is chosen in one pair and rejected in another


def render_ranked(
    row: Mapping[str, Any],
    ids: Sequence[list[int]],
    tokenizer: Any,
    *,
    limits: LengthLimits | None = None,
    max_tokens: int = 200,
) -> RenderableType:
    """Render a tokenised ranked row, and what training would cut from it.

    Args:
        row: a ranked row in the normal form.
        ids: token ids of the prompt and of each answer.
        tokenizer: turns ids into text.
        limits: the options that decide the cut; None cuts nothing.
        max_tokens: most tokens to print of one part; of a longer part, the middle is left out.

    Returns:
        A rich renderable. Answers have their numbers in the source, counted from 0.
    """
    limits = limits or LengthLimits()
    prompt, *answers = (list(part) for part in ids)
    cut = limits.plan_cut(len(prompt), *map(len, answers))
    _, *kept = cut.apply(prompt, *answers)
    shared = min(common_prefix_length(kept[0], other) for other in kept[1:])
    parts = [
        TokenPart("prompt, cut on the left", CUT, prompt[: cut.prompt]),
        TokenPart("prompt, masked", MASKED, prompt[cut.prompt :]),
        TokenPart("all answers begin", SHARED, kept[0][:shared]),
    ]
    places = row[PLACES_COLUMN]
    pairs = [(int(chosen), int(rejected)) for chosen, rejected in row[PAIRS_COLUMN]]
    for number, (place, answer, rest) in enumerate(zip(places, answers, kept, strict=True)):
        parts.append(TokenPart(f"answer {place}, scored", _style(number, pairs), rest[shared:]))
        parts.append(TokenPart(f"answer {place}, cut", CUT, answer[len(rest) :]))
    lines = [_headline(row, prompt, answers, shared), *_pair_lines(row, pairs, answers, cut)]
    if limits.names:
        lines.append(_cut_line(cut, limits, places))
    return Group(*lines, token_table(parts, tokenizer, max_tokens))


def _style(number: int, pairs: Sequence[tuple[int, int]]) -> str:
    is_chosen = any(chosen == number for chosen, _ in pairs)
    is_rejected = any(rejected == number for _, rejected in pairs)
    if is_chosen and is_rejected:
        return _BOTH
    return CHOSEN if is_chosen else REJECTED


def _headline(
    row: Mapping[str, Any], prompt: list[int], answers: Sequence[list[int]], shared: int
) -> Text:
    sizes = ", ".join(str(len(answer)) for answer in answers)
    return Text(
        f"row {row.get('row')} (counted from 0): prompt {len(prompt)} tokens, answers {sizes}; "
        f"{shared_beginning(shared)}",
        style="bold",
    )


def _pair_lines(
    row: Mapping[str, Any],
    pairs: Sequence[tuple[int, int]],
    answers: Sequence[list[int]],
    cut: Cut,
) -> list[Text]:
    """Which answers are compared, and which pairs training leaves out."""
    places, ties = row[PLACES_COLUMN], row[TIES_COLUMN]
    names = [f"{places[chosen]} > {places[rejected]}" for chosen, rejected in pairs]
    made = ", ".join(names)
    lines = [Text(f"pairs, chosen > rejected ({len(pairs)}): {made}")]
    if ties:
        lines.append(Text(f"pairs that equal scores leave unmade: {ties}"))
    for name, pair in zip(names, pairs, strict=True):
        both = [answers[number] for number in pair]
        if reason := reason_left_out(both, cut.of_answers(pair)):
            lines.append(Text(f"left out of training, {name}: {reason}", style="bold yellow"))
    return lines


def _cut_line(cut: Cut, limits: LengthLimits, places: Sequence[int]) -> Text:
    if not cut.fits or not any((cut.prompt, *cut.answers)):
        return Text(f"{limits}: nothing is cut")
    cuts = zip(places, cut.answers, strict=True)
    of = ", ".join(f"{tokens} of answer {place}" for place, tokens in cuts if tokens)
    return Text(
        f"{limits}: cut {cut.prompt} tokens of the prompt on its left"
        + (f", {of} on its right" if of else ""),
        style="yellow",
    )
