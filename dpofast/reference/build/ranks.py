"""Coordinates the ranks that share a build, and stops all of them if one can't go on.

When each rank holds a part of one model, none can score or stop without the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from dpofast.errors import ReferenceStoreError

# Takes an object from each rank and returns the objects of all ranks, in rank order. All ranks must
# call it at the same time.
Exchange = Callable[[Any], list[Any]]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The place of this process among the processes that build together.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        barrier: function that returns once all ranks have called it.
    """

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None


def on_all_ranks(action: Callable[[], Result], exchange: Exchange | None) -> Result:
    """Call `action` on all ranks, and raise on all of them if it raises on one.

    Otherwise the other ranks would go on, and wait forever for the one that stopped.

    Args:
        action: function that doesn't communicate with other ranks.
        exchange: function that exchanges objects between the ranks; None if the ranks don't depend
            on each other, in which case `action` is simply called.

    Returns:
        The result of `action` on this rank.

    Raises:
        ReferenceStoreError: `action` raised on another rank; the message names that rank.
        Exception: `action` raised it on this rank.
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
