"""Exchanges objects between the ranks of a run."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object


def exchange(item: Any) -> list[Any]:
    """Take an object from each rank, and return the objects of all ranks in rank order."""
    items: list[Any] = gather_object([item])
    return items
