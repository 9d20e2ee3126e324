"""Checkpoints of which each node has a part of its own, as save_on_each_node saves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpofast.errors import CheckpointError
from dpofast.train.checkpoint.manifest import Manifest, ManifestError
from dpofast.train.checkpoint.resume import PREFIX, step_folders, why_not_resumed, why_not_whole
from dpofast.train.checkpoint.staging import list_files, missing_of_ranks

Exchange = Callable[[Any], list[Any]]


def whole_on_all_nodes(
    output_dir: str | Path, run_id: str | None, hashes: bool, is_leader: bool, exchange: Exchange
) -> dict[int, str | None]:
    """Look for the newest checkpoint of which every node has its part, whole; on all ranks.

    A run that was killed may have finished its last checkpoint on some of its nodes only.

    Args:
        output_dir: the run's output folder, another one on each node.
        run_id: the run; None if there is none.
        hashes: compare the hashes of all files, not only their sizes. Checkpoints that are older
            than the first whole one aren't read.
        is_leader: whether this rank looks for its node.
        exchange: takes an object of each rank and returns those of all ranks, in their order.

    Returns:
        By step, for the checkpoints that all nodes have: why the run can't go on from it; None if
        it can.
    """
    own: list[int] | None = None
    if is_leader:
        folders = [] if run_id is None else step_folders(output_dir)
        whole = [f for f in folders if why_not_resumed(f, run_id, hashes=False) is None]
        own = [Manifest.read(folder).step for folder in whole]
    steps = set.intersection(*(set(found) for found in exchange(own) if found is not None))
    reasons: dict[int, str | None] = {}
    for step in sorted(steps, reverse=True):
        folder = Path(output_dir) / f"{PREFIX}{step}"
        reason = why_not_resumed(folder, run_id) if is_leader and hashes else None
        told = [f"{why}, on the node of rank {r}" for r, why in enumerate(exchange(reason)) if why]
        reasons[step] = told[0] if told else None
        if not told:
            break
    return reasons


def check_files_of_ranks(
    checkpoint: str | Path, ranks: Sequence[int], world_size: int, is_sharded: bool
) -> None:
    """Check that a folder has the files of the ranks that read them there.

    With save_on_each_node, it has those of the ranks that ran on this node when it was saved.

    Args:
        checkpoint: folder of the checkpoint.
        ranks: the ranks that read it.
        world_size: number of ranks of the run.
        is_sharded: whether each rank reads its part of the optimizer, as under ZeRO.

    Raises:
        CheckpointError: a file is missing, though the run has as many ranks as the one that saved.
    """
    try:
        manifest = Manifest.read(Path(checkpoint))
    except ManifestError:
        return
    if manifest.ranks != world_size:
        return
    files = list_files(Path(checkpoint))
    missing = missing_of_ranks(files, ranks, world_size, is_sharded=is_sharded)
    if missing:
        raise CheckpointError(
            f"resume_from_checkpoint: {str(checkpoint)!r} has no {missing[0]}, as another machine "
            "saved it (save_on_each_node). Start the machines in the order in which they were, or "
            "copy the files of the same checkpoint from all machines into one folder."
        )


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
