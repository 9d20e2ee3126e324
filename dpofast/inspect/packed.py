"""Shows a packed row: its parts, a picture of the attention, and the tokens of each pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dpofast.counted import counted
from dpofast.data.packing.batch import PackedPairs
from dpofast.inspect.picture import AttentionPicture, PicturePart
from dpofast.inspect.row_parts import PREFIX, RowPart, RowUnit, row_units
from dpofast.inspect.tokens import CHOSEN, MASKED, REJECTED, SHARED, TokenPart, token_table

_STYLES = {"prefix": SHARED, "chosen": CHOSEN, "rejected": REJECTED}


def render_packed(
    batch: PackedPairs,
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    window: int | None = None,
    chunk: int | None = None,
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
        chunk: number of positions in a chunk of the layers that attend in chunks; likewise.
        max_tokens: most tokens to print per part; the middle of a longer part is left out.
    """
    if not batch.num_pairs:
        return Text("no pairs: one token runs along, and nothing is scored", style="yellow")
    units = row_units(batch)
    input_ids = batch.input_ids[0].tolist()
    shown: list[RenderableType] = [_headline(batch), _table(units, examples), Text()]
    shown += [*_pictures(batch, units, examples, window, chunk), Text()]
    for unit in units:
        shown.append(Text(_title(unit, examples), style="bold"))
        if len(unit.pairs) > 1:
            shown += [Text(f"{better} over {worse}") for better, worse in unit.names]
        prompt_length = len(examples[unit.pairs[0]]["prompt_ids"])
        stretches = _stretches(unit, input_ids, prompt_length)
        shown.append(token_table(list(stretches), tokenizer, max_tokens))
    return Group(*shown)


def _title(unit: RowUnit, examples: Sequence[Mapping[str, Any]]) -> str:
    example = examples[unit.pairs[0]]
    source = f" of {example['source']}" if "source" in example else ""
    return f"pair{'s' if len(unit.pairs) > 1 else ''} {_rows(unit, examples)}{source}"


def _rows(unit: RowUnit, examples: Sequence[Mapping[str, Any]], most: int | None = None) -> str:
    """The numbers of the pairs in the data; pairs of one row of the data have its number.

    Args:
        unit, examples: the pairs, and what is known of each pair.
        most: most numbers to name; None for all.
    """
    rows = list(dict.fromkeys(str(examples[pair]["row"]) for pair in unit.pairs))
    if most is not None and len(rows) > most:
        return f"{rows[0]} and {len(rows) - 1} more"
    return ", ".join(rows)


def _headline(batch: PackedPairs) -> Text:
    return Text(
        f"{counted(batch.num_pairs, 'pair')} in {batch.num_body_tokens} tokens "
        f"({batch.num_tokens} one sequence at a time), {len(batch.labels)} scored",
        style="bold",
    )


def _table(units: Sequence[RowUnit], examples: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("pair", justify="right", overflow="fold", max_width=20)
    table.add_column("part", no_wrap=True)
    for name in ("tokens", "in the row", "positions"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("scored from", overflow="fold")
    for unit in units:
        for index, part in enumerate(unit.parts):
            table.add_row(
                "" if index else _rows(unit, examples),  # only in the first line of a group
                Text(part.name, style=_style(part)),
                str(part.length),
                _span(part.start, part.length),
                _span(part.position, part.length),
                ", ".join(_span(first, last - first + 1) for first, last in part.scored),
            )
    return table


def _pictures(
    batch: PackedPairs,
    units: Sequence[RowUnit],
    examples: Sequence[Mapping[str, Any]],
    window: int | None,
    chunk: int | None,
) -> Iterator[RenderableType]:
    """A picture of full attention, and one of a window and of chunks if these cut anything."""
    layout = batch.shared_layout
    assert layout is not None
    drawn = [
        # A label takes its width from the picture.
        PicturePart(part.start, f"{_rows(unit, examples, most=2)} {part.name}", _style(part))
        for unit in units
        for part in unit.parts
        if part.length
    ]
    yield AttentionPicture(layout, drawn)
    if window is not None and window < layout.max_key_length:
        yield Text()
        yield Text(f"layers with a window look back over {window} tokens:", style="bold")
        yield AttentionPicture(layout, drawn, window=window)
    if chunk is not None and chunk < layout.max_key_length:
        yield Text()
        yield Text(f"layers with chunks look at their own chunk of {chunk} tokens:", style="bold")
        yield AttentionPicture(layout, drawn, chunk=chunk)


def _stretches(unit: RowUnit, input_ids: Sequence[int], prompt_length: int) -> Iterator[TokenPart]:
    """Split the parts where the prompt ends, so that each stretch is shown in one style."""
    begin = "both begin" if len(unit.pairs) == 1 else "all begin"
    for part in unit.parts:
        ids = input_ids[part.start : part.start + part.length]
        num_masked = max(prompt_length - part.position, 0)
        title = begin if part.name == PREFIX else part.name
        yield TokenPart("prompt", MASKED, ids[:num_masked])
        yield TokenPart(title, _style(part), ids[num_masked:])


def _style(part: RowPart) -> str:
    return _STYLES.get(part.name, "")


def _span(start: int, length: int) -> str:
    if length < 2:
        return str(start) if length else "-"
    return f"{start}-{start + length - 1}"
