"""Exchanges objects between the ranks of a run."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from dpofast.errors import DPOFastError, RankError, one_line
from dpofast.ranks.member import own_node

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
    outcome = [result, _told(error, rank=0)]
    broadcast_object_list(outcome)
    if error is not None or outcome[1] is not None:
        raise error or outcome[1]
    return outcome[0]


def done_on(is_doer: bool, do: Callable[[], object]) -> None:
    """Call a function on some ranks, such as the first one of each node; all ranks call this.

    Args:
        is_doer: whether this rank calls the function.
        do: the function. It must not talk to other ranks.

    Raises:
        Exception: what `do` raised on this rank.
        DPOFastError: on all ranks, if it is an error of ours and `do` raised it on any of them. It
            names the rank and its host, unless all doers raised one.
        RankError: on the other ranks, if it is another one.
    """
    error: Exception | None = None
    if is_doer:
        try:
            do()
        except Exception as raised:
            error = raised
    rank = PartialState().process_index
    told = exchange((is_doer, _told(error, rank), socket.gethostname()))
    if error is not None and not isinstance(error, DPOFastError):
        raise error
    failed = [(rank, raised, host) for rank, (_, raised, host) in enumerate(told) if raised]
    if not failed:
        return
    rank, first, host = failed[0]
    if len(failed) < sum(doer for doer, _, _ in told):
        first.args = (f"rank {rank} on host {host}: {first}",)
    raise first


def ranks_of_this_node() -> list[int]:
    """The ranks that run on the node of this rank; all ranks must call this."""
    nodes = exchange(own_node())
    own = nodes[PartialState().process_index]
    return [rank for rank, node in enumerate(nodes) if node == own]


def _told(error: Exception | None, rank: int) -> Exception | None:
    """What the other ranks are told about an error; theirs is the same, if it is one of ours."""
    if error is None or isinstance(error, DPOFastError):
        return error
    return RankError(f"Rank {rank} has failed: {type(error).__name__}: {one_line(error)}")
