"""Tokens as coloured text with "|" between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

MASKED, SHARED, CHOSEN, REJECTED, CUT = "dim", "cyan", "green", "red", "dim strike"


@dataclass(frozen=True)
class TokenPart:
    """A stretch of tokens that has one title and is shown in one style."""

    title: str
    style: str
    ids: Sequence[int]


def token_table(parts: Sequence[TokenPart], tokenizer: Any, max_tokens: int) -> Table:
    """Make a table with a line for each part: its title, the number of its tokens, the tokens.

    Args:
        parts: what to show, from the first line to the last; a part without tokens has no line.
        tokenizer: turns ids into text; line breaks are shown as "⏎".
        max_tokens: most tokens to print per part; the middle of a longer part is left out.
    """
    table = Table.grid(padding=(0, 1))
    for part in parts:
        if part.ids:
            title = Text(f"{part.title} ({len(part.ids)})", style="bold")
            table.add_row(title, _tokens(part, tokenizer, max_tokens))
    return table


def _tokens(part: TokenPart, tokenizer: Any, max_tokens: int) -> Text:
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
        # Tokens are decoded one by one, so that the text shows where each of them ends.
        shown = tokenizer.decode([token], skip_special_tokens=False)
        text.append(shown.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥"), style=style)
    return text


def shared_beginning(count: int) -> str:
    """How many tokens the answers to a prompt begin with alike, as a clause."""
    if count == 0:
        return "the answers begin with different tokens"
    return f"the answers share their first {'token' if count == 1 else f'{count} tokens'}"
