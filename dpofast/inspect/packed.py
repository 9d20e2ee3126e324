"""Shows a packed row: its parts, a picture of the attention, and the tokens of each pair."""

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
    """A stretch of a packed row: a prefix that a pair's sequences share, or what follows it.

    In the layout `unshared`, nothing is shared and a part is a whole sequence.

    Attributes:
        pair: number of the pair in the row, from 0.
        name: "prefix", "chosen" or "rejected".
        start: index of the part's first token in the row.
        length: number of tokens; 0 for a sequence that ends with the prefix.
        position: index of the part's first token in its sequence.
        scored: where in the row the hidden states are that predict the answer's tokens, as runs
            (first index, last index); empty for a prefix.
    """

    pair: int
    name: str
    start: int
    length: int
    position: int
    scored: tuple[tuple[int, int], ...] = ()


def row_parts(batch: PackedPairs) -> Iterator[RowPart]:
    """Yield the parts of a packed row of pairs, in the row's order.

    A pair in the layout `shared` has three parts: prefix, chosen, rejected. A pair in the layout
    `unshared` has two: chosen and rejected, each with the prompt before it.
    """
    layout = batch.shared_layout
    assert layout is not None
    num_groups = int(layout.group_ids[-1]) + 1
    # A group has a prefix and at most two tails, so three numbers are enough for its parts.
    part_ids = layout.group_ids * 3 + layout.tail_ids  # [T]
    lengths = torch.bincount(part_ids, minlength=3 * num_groups).view(num_groups, 3).tolist()
    is_shared = num_groups == batch.num_pairs
    start = 0
    for pair, name, length, position in _pairs(lengths) if is_shared else _sequences(lengths):
        scored = () if name == "prefix" else _scored_runs(batch, pair, name)
        yield RowPart(pair, name, start, length, position, scored)
        start += length


def _pairs(lengths: Sequence[Sequence[int]]) -> Iterator[tuple[int, str, int, int]]:
    """Yield (pair, name, length, position) for the parts of groups that are pairs."""
    for pair, (prefix, chosen, rejected) in enumerate(lengths):
        yield pair, "prefix", prefix, 0
        yield pair, "chosen", chosen, prefix
        yield pair, "rejected", rejected, prefix


def _sequences(lengths: Sequence[Sequence[int]]) -> Iterator[tuple[int, str, int, int]]:
    """Yield (pair, name, length, position) for groups that are single sequences."""
    for group, (length, _, _) in enumerate(lengths):  # such a group is all prefix, without tails
        pair, answer = divmod(group, 2)
        yield pair, ("chosen", "rejected")[answer], length, 0


def _scored_runs(batch: PackedPairs, pair: int, name: str) -> tuple[tuple[int, int], ...]:
    sequence = 2 * pair + (name == "rejected")
    first, end = batch.bounds[sequence : sequence + 2].tolist()
    return tuple(_runs(batch.scored_positions[first:end]))


def render_packed(
    batch: PackedPairs,
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    window: int | None = None,
    max_tokens: int = 40,
) -> RenderableType:
    """Render a packed row: a table of its parts, a picture of its attention, its tokens.

    Args:
        batch: pairs in a packed layout.
        examples: one mapping for each pair, with prompt_ids and `row` (the pair's number in the
            data).
        tokenizer: turns ids into text.
        window: number of positions that layers with a sliding window look back; None if the model
            has no such layers.
        max_tokens: most tokens to print per part; the middle of a longer part is left out.
    """
    if not batch.num_pairs:
        return Text("no pairs: one token runs along, and nothing is scored", style="yellow")
    parts = list(row_parts(batch))
    input_ids = batch.input_ids[0].tolist()
    shown: list[RenderableType] = [_headline(batch), _table(parts, examples), Text()]
    shown += [*_pictures(batch, parts, examples, window), Text()]
    for pair, example in enumerate(examples):
        own = [part for part in parts if part.pair == pair]
        source = f" of {example['source']}" if "source" in example else ""
        shown.append(Text(f"pair {example['row']}{source}", style="bold"))
        stretches = _stretches(own, input_ids, len(example["prompt_ids"]))
        shown.append(token_table(list(stretches), tokenizer, max_tokens))
    return Group(*shown)


def _headline(batch: PackedPairs) -> Text:
    pairs = "1 pair" if batch.num_pairs == 1 else f"{batch.num_pairs} pairs"
    return Text(
        f"{pairs} in {batch.num_body_tokens} tokens ({batch.num_tokens} one sequence at a time), "
        f"{len(batch.labels)} scored",
        style="bold",
    )


def _table(parts: Sequence[RowPart], examples: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("pair", justify="right", no_wrap=True)
    table.add_column("part", no_wrap=True)
    for name in ("tokens", "in the row", "positions"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("scored from", overflow="fold")
    last_pair = -1
    for part in parts:
        # Only the first line of a pair shows its number.
        number = str(examples[part.pair]["row"]) if part.pair != last_pair else ""
        last_pair = part.pair
        table.add_row(
            number,
            Text(part.name, style=_STYLES[part.name]),
            str(part.length),
            _span(part.start, part.length),
            _span(part.position, part.length),
            ", ".join(_span(first, last - first + 1) for first, last in part.scored),
        )
    return table


def _pictures(
    batch: PackedPairs,
    parts: Sequence[RowPart],
    examples: Sequence[Mapping[str, Any]],
    window: int | None,
) -> Iterator[RenderableType]:
    """A picture of full attention, and one of windowed attention if the window cuts anything."""
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


def _stretches(
    parts: Sequence[RowPart], input_ids: Sequence[int], prompt_length: int
) -> Iterator[TokenPart]:
    """Split a pair's parts where the prompt ends, so that each stretch is shown in one style."""
    for part in parts:
        ids = input_ids[part.start : part.start + part.length]
        num_masked = max(prompt_length - part.position, 0)
        title = "both begin" if part.name == "prefix" else part.name
        yield TokenPart("prompt", MASKED, ids[:num_masked])
        yield TokenPart(title, _STYLES[part.name], ids[num_masked:])


def _runs(
    positions: Tensor,  # [n]
) -> Iterator[tuple[int, int]]:
    """First and last number of each run of consecutive numbers."""
    breaks = (positions.diff() != 1).nonzero()[:, 0].tolist()
    firsts, lasts = [0, *(index + 1 for index in breaks)], [*breaks, len(positions) - 1]
    return ((int(positions[i]), int(positions[j])) for i, j in zip(firsts, lasts, strict=True))


def _span(start: int, length: int) -> str:
    if length < 2:
        return str(start) if length else "-"
    return f"{start}-{start + length - 1}"
