"""Ranks that each hold a part of one model, so that none can go on or stop without the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from dpofast.errors import ReferenceStoreError

# Hands a rank's object to all: they call it together, and each gets everyone's, in rank order.
Exchange = Callable[[Any], list[Any]]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among those that build together.

    Attributes:
        barrier: returns when all ranks have called it.
    """

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None


def on_all_ranks(action: Callable[[], Result], exchange: Exchange | None) -> Result:
    """What `action` returns; if it raises on one rank, none goes on to wait for that one.

    Args:
        action: without communication between ranks.
        exchange: None where ranks don't depend on one another; then this just calls `action`.

    Raises:
        ReferenceStoreError: another rank's action raised; its rank and message are in this one.
        Exception: whatever this rank's raised.
    """
    if exchange is None:
        return action()
    try:
        result = action()
    except Exception as error:
        exchange(str(error) or type(error).__name__)
        raise
    for rank, message in enumerate(exchange(None)):
        if message is not None:
            raise ReferenceStoreError(f"Rank {rank} stopped the build: {message}")
    return result
