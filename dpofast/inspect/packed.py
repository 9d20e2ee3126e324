"""Shows a packed row: which token belongs to which pair, and what attends to what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dpofast.data.packing.batch import PackedPairs
from dpofast.inspect.picture import AttentionPicture, PicturePart
from dpofast.inspect.tokens import CHOSEN, MASKED, REJECTED, SHARED, TokenPart, token_table

_STYLES = {"prefix": SHARED, "chosen": CHOSEN, "rejected": REJECTED}


@dataclass(frozen=True)
class RowPart:
    """A stretch of a packed row.

    Attributes:
        pair: which of the row's pairs it belongs to, from 0.
        name: "prefix" (of both sequences), "chosen" or "rejected" (all of it, or what follows the
            prefix).
        start: place in the row of its first token.
        length: tokens, 0 where the other answer begins with this one.
        position: of its first token in its sequence.
        scored: of an answer, the runs (first, last) of places whose hidden state predicts one of
            its tokens.
    """

    pair: int
    name: str
    start: int
    length: int
    position: int
    scored: tuple[tuple[int, int], ...] = ()


def row_parts(batch: PackedPairs) -> Iterator[RowPart]:
    """The parts of a packed row of pairs, in its order."""
    layout = batch.shared_layout
    assert layout is not None
    num_groups = int(layout.group_ids[-1]) + 1
    shares = num_groups == batch.num_pairs
    tails = 2 if shares else 0
    keys = layout.group_ids * (tails + 1) + layout.tail_ids
    lengths = torch.bincount(keys, minlength=num_groups * (tails + 1)).tolist()
    start = 0
    for index, length in enumerate(lengths):
        group, tail = divmod(index, tails + 1)
        pair, answer = (group, tail - 1) if shares else divmod(group, 2)
        prefix = 0 if tail == 0 else lengths[index - tail]
        scored: tuple[tuple[int, int], ...] = ()
        if answer >= 0:
            first, end = batch.bounds[2 * pair + answer : 2 * pair + answer + 2].tolist()
            scored = tuple(_runs(batch.scored_positions[first:end]))
        yield RowPart(pair, ("chosen", "rejected", "prefix")[answer], start, length, prefix, scored)
        start += length


def render_packed(
    batch: PackedPairs,
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    window: int | None = None,
    max_tokens: int = 40,
) -> RenderableType:
    """Show a packed row: its parts, a picture of its attention, its tokens.

    Args:
        batch: in a packed layout, of pairs.
        examples: of each pair, `row` (as the data counts it) and prompt_ids.
        tokenizer: turns ids into text.
        window: of layers that look back only so far, in positions.
        max_tokens: of a longer part, the first and last tokens are shown, this many in all.
    """
    if not batch.num_pairs:
        return Text("no pairs: one token runs along, and nothing is scored", style="yellow")
    parts = list(row_parts(batch))
    shown: list[RenderableType] = [_headline(batch), _table(parts, examples), Text()]
    shown += [*_pictures(batch, parts, examples, window), Text()]
    for pair, example in enumerate(examples):
        own = [part for part in parts if part.pair == pair]
        shown.append(Text(f"pair {example['row']}", style="bold"))
        stretches = _stretches(own, batch.input_ids[0].tolist(), len(example["prompt_ids"]))
        shown.append(token_table(list(stretches), tokenizer, max_tokens))
    return Group(*shown)


def _headline(batch: PackedPairs) -> Text:
    tokens, alone, scored = batch.num_body_tokens, batch.num_tokens, len(batch.labels)
    pairs = "1 pair" if batch.num_pairs == 1 else f"{batch.num_pairs} pairs"
    return Text(
        f"{pairs} in {tokens} tokens ({alone} one sequence at a time), {scored} scored",
        style="bold",
    )


def _table(parts: Sequence[RowPart], examples: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("pair", justify="right", no_wrap=True)
    table.add_column("part", no_wrap=True)
    for name in ("tokens", "in the row", "positions"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("scored from", overflow="fold")
    last = -1
    for part in parts:
        name = str(examples[part.pair]["row"]) if part.pair != last else ""
        last = part.pair
        table.add_row(
            name,
            Text(part.name, style=_STYLES[part.name]),
            str(part.length),
            _span(part.start, part.length),
            _span(part.position, part.length),
            ", ".join(_span(first, final - first + 1) for first, final in part.scored),
        )
    return table


def _pictures(
    batch: PackedPairs,
    parts: Sequence[RowPart],
    examples: Sequence[Mapping[str, Any]],
    window: int | None,
) -> Iterator[RenderableType]:
    """That of the attention; another one where a window cuts something off."""
    layout = batch.shared_layout
    assert layout is not None
    drawn = [
        PicturePart(part.start, f"{examples[part.pair]['row']} {part.name}", _STYLES[part.name])
        for part in parts
        if part.length
    ]
    yield AttentionPicture(layout, drawn)
    if window is not None and window < layout.max_key_length:
        yield Text()
        yield Text(f"layers with a window look back over {window} tokens:", style="bold")
        yield AttentionPicture(layout, drawn, window)


def _stretches(parts: Sequence[RowPart], row: Sequence[int], prompt: int) -> Iterator[TokenPart]:
    """What of a pair is shown in one style; the prompt ends inside the part it begins."""
    for part in parts:
        ids = row[part.start : part.start + part.length]
        masked = max(prompt - part.position, 0)
        rest = "both begin" if part.name == "prefix" else part.name
        yield TokenPart("prompt", MASKED, ids[:masked])
        yield TokenPart(rest, _STYLES[part.name], ids[masked:])


def _runs(
    places: Tensor,  # [n]
) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    breaks = (places.diff() != 1).nonzero()[:, 0].tolist()
    firsts, finals = [0, *(place + 1 for place in breaks)], [*breaks, len(places) - 1]
    return ((int(places[i]), int(places[j])) for i, j in zip(firsts, finals, strict=True))


def _span(start: int, length: int) -> str:
    if length < 2:
        return str(start) if length else "-"
    return f"{start}-{start + length - 1}"
