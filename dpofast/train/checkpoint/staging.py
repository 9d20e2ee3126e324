"""The folder in which a checkpoint is written before it gets its name, and its renaming.

A kill between any two operations leaves the old state or the new one; `recover` tidies up:

    _saving-checkpoint-N/checkpoint-N   being written; whole once it has a manifest
    _replaced-checkpoint-N              makes way for a newer checkpoint-N
    _deleting-checkpoint-N              being deleted
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from dpofast.sync import sync
from dpofast.train.checkpoint.aside import move_checkpoints
from dpofast.train.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    ManifestError,
    verify,
)

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
# Uploads to the hub leave out names that begin so.
SAVING, REPLACED, DELETING = "_saving-", "_replaced-", "_deleting-"


def saving_area(run_dir: Path, step: int) -> Path:
    """The folder that holds the checkpoint of a step while it is being written."""
    return run_dir / f"{SAVING}{PREFIX}{step}"


def staged_folder(run_dir: Path, step: int) -> Path:
    """The checkpoint of a step while it is being written."""
    return saving_area(run_dir, step) / f"{PREFIX}{step}"


def make_area(run_dir: Path, step: int) -> None:
    """Make the empty folder of a checkpoint that is to be written.

    Raises:
        OSError: it can't be made.
    """
    area = saving_area(run_dir, step)
    if area.exists():
        shutil.rmtree(area)
    staged_folder(run_dir, step).mkdir(parents=True)


def list_files(folder: Path) -> dict[str, int]:
    """Path and bytes of each file of a checkpoint, apart from the manifest."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST_FILE
    }


def missing_of_ranks(
    names: Iterable[str], ranks: Iterable[int], world_size: int, *, is_sharded: bool
) -> list[str]:
    """The files of single ranks that a checkpoint should have and doesn't.

    Args:
        names: the files that it has.
        ranks: the ranks that wrote into this folder.
        world_size: ranks of the run.
        is_sharded: whether each rank writes its part of the optimizer, as under ZeRO.
    """
    names = set(names)
    missing = []
    for rank in ranks:
        random_state = f"rng_state_{rank}.pth" if world_size > 1 else "rng_state.pth"
        if random_state not in names:
            missing.append(random_state)
        shard = f"zero_pp_rank_{rank}_mp_rank_"
        if is_sharded and not any(shard in name and "optim_states" in name for name in names):
            missing.append(f"{shard}*_optim_states.pt")
    return missing


def publish(run_dir: Path, step: int) -> Path:
    """Give a checkpoint that has its manifest its name, in place of an older one of that name.

    An older one of another run isn't deleted but moved aside.

    Returns:
        The folder `checkpoint-N`.

    Raises:
        OSError: it can't be renamed.
    """
    staged, final = staged_folder(run_dir, step), run_dir / f"{PREFIX}{step}"
    for folder in (path for path in staged.rglob("*") if path.is_dir()):
        sync(folder)
    sync(staged)
    replaced = run_dir / f"{REPLACED}{final.name}"
    if final.exists() and _is_of_another_run(final, staged):
        move_checkpoints(run_dir, [final])
    if final.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        final.rename(replaced)
    staged.rename(final)
    sync(run_dir)
    shutil.rmtree(saving_area(run_dir, step), ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _is_of_another_run(final: Path, staged: Path) -> bool:
    """Whether a checkpoint isn't known to be of the run that has written another one."""
    try:
        return Manifest.read(final).run_id != Manifest.read(staged).run_id
    except ManifestError as error:
        return error.is_missing  # an older version may have written it; a damaged one is no loss


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint so that a kill never leaves a part of it under its name.

    Raises:
        OSError: it can't be renamed.
    """
    doomed = checkpoint.with_name(f"{DELETING}{checkpoint.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    checkpoint.rename(doomed)
    sync(doomed.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def recover(run_dir: str | Path) -> None:
    """Finish or undo what killed processes have left in a run's output folder.

    A checkpoint that was written to its end gets its name; what was not is deleted. No other
    process may be writing there.

    Raises:
        OSError: a folder can't be renamed or deleted.
    """
    run_dir = Path(run_dir)
    for area in sorted(run_dir.glob(f"{SAVING}{PREFIX}*")):
        name = area.name.removeprefix(SAVING)
        if (area / name).is_dir() and not verify(area / name, hashes=False):
            publish(run_dir, int(name.removeprefix(PREFIX)))
            logger.info("Finished the save of %s, which had been written to its end.", name)
        else:
            shutil.rmtree(area)
            logger.info("Deleted %s, which an interrupted save has left.", area)
    for replaced in sorted(run_dir.glob(f"{REPLACED}{PREFIX}*")):
        final = run_dir / replaced.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    for doomed in sorted(run_dir.glob(f"{DELETING}{PREFIX}*")):
        shutil.rmtree(doomed)
    if os.name == "posix" and run_dir.is_dir():
        sync(run_dir)
