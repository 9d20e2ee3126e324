"""Exchanges objects between the ranks of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from dpofast.errors import DPOFastError, RankError, one_line

Result = TypeVar("Result")


def exchange(item: Any) -> list[Any]:
    """Take an object from each rank, and return the objects of all ranks in rank order."""
    items: list[Any] = gather_object([item])
    return items


def decided_by_rank_0(decide: Callable[[], Result]) -> Result:
    """Call a function on rank 0, and return its result on all ranks.

    Args:
        decide: what only one rank may do, or must decide for all. It must not talk to other ranks.

    Raises:
        Exception: what `decide` raised, on all ranks if it is an error of ours.
        RankError: on the other ranks, if it is another one.
    """
    result: Any = None
    error: Exception | None = None
    if PartialState().is_main_process:
        try:
            result = decide()
        except Exception as raised:
            error = raised
    told = error
    if error is not None and not isinstance(error, DPOFastError):
        told = RankError(f"Rank 0 has failed: {type(error).__name__}: {one_line(error)}")
    outcome = [result, told]
    broadcast_object_list(outcome)
    if error is not None or outcome[1] is not None:
        raise error or outcome[1]
    return outcome[0]
