"""Checkpoints of which each node has a part of its own, as save_on_each_node saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpofast.errors import CheckpointError
from dpofast.train.checkpoint.manifest import Manifest
from dpofast.train.checkpoint.resume import step_folders, why_not_resumed, why_not_whole

Exchange = Callable[[Any], list[Any]]


def whole_on_all_nodes(
    output_dir: str | Path, hashes: bool, is_leader: bool, exchange: Exchange
) -> frozenset[tuple[str, int]]:
    """The checkpoints of which every node has its part, whole; all ranks must call this.

    A run that was killed may have finished its last checkpoint on some of its nodes only.

    Args:
        output_dir: the run's output folder, another one on each node.
        hashes: compare the hashes of all files, not only their sizes.
        is_leader: whether this rank looks for its node.
        exchange: takes an object of each rank and returns those of all ranks, in their order.

    Returns:
        Run id and step of each.
    """
    own = None
    if is_leader:
        whole = [f for f in step_folders(output_dir) if why_not_resumed(f, None, hashes) is None]
        manifests = [Manifest.read(folder) for folder in whole]
        own = [(manifest.run_id, manifest.step) for manifest in manifests]
    of_nodes = [set(map(tuple, found)) for found in exchange(own) if found is not None]
    return frozenset(set.intersection(*of_nodes))


def check_on_each_node(checkpoint: str, is_leader: bool, exchange: Exchange) -> None:
    """Check each node's part of the checkpoint that the run resumes from; on all ranks.

    Args:
        checkpoint: folder of the checkpoint.
        is_leader: whether this rank looks for its node.
        exchange: as in `whole_on_all_nodes`.

    Raises:
        CheckpointError: on all ranks; names the rank that looked, and the file.
    """
    reasons = exchange(why_not_whole(checkpoint) if is_leader else None)
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise CheckpointError(
                f"resume_from_checkpoint: {checkpoint!r} is not whole on the node of rank {rank}: "
                f"{reason}; name another one."
            )
