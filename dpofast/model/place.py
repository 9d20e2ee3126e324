"""Names the place of a tokenised pair in the user's data, for messages."""

from __future__ import annotations

from typing import Any


def place_of_pair(pairs: Any, index: int, name: str) -> str:
    """The dataset and the row that a pair was read from.

    Args:
        pairs: tokenised datasets.Dataset, with the column `row` and, if it is a mixture, `source`.
        index: index of the pair.
        name: dataset name; in a mixture, the pair's source has a name of its own.
    """
    pair = pairs.select_columns([c for c in ("row", "source") if c in pairs.column_names])[index]
    return f"{pair.get('source') or name}, row {pair['row']} (counted from 0)"
