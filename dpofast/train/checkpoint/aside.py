"""Moves the checkpoints of another run out of the way of this one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dpofast.errors import CheckpointError
from dpofast.train.checkpoint.resume import recorded_run_id
from dpofast.train.checkpoint.run_id import RUN_FILE, Run, write_run

# transformers uploads no file whose path begins with "_" to the hub.
OLDER_RUNS = "_older-runs"
UNKNOWN_RUN = "unknown"

logger = logging.getLogger(__name__)


def move_reports(
    output_dir: Path, owner: Run | None, reports: Sequence[str], checkpoints: Sequence[Path]
) -> None:
    """Move the reports of the run that an output folder belongs to into the folder of that run.

    The folder is made like an output folder, in which the older run can be resumed.

    Args:
        output_dir: the output folder.
        owner: the run that it belongs to; None if that isn't known.
        reports: names of the files; some may not be there.
        checkpoints: folders that will be moved, too.
    """
    found = [output_dir / name for name in reports if (output_dir / name).exists()]
    has_saved = owner is not None and owner.run in map(recorded_run_id, checkpoints)
    if not found and not has_saved:
        return
    folder = output_dir / OLDER_RUNS / (UNKNOWN_RUN if owner is None else owner.run)
    with _refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if owner is not None and not (folder / RUN_FILE).exists():
            write_run(folder, owner)
        for path in found:
            path.rename(_free(folder / path.name))


def copy_reports(output_dir: Path, owner: Run, reports: Sequence[str]) -> None:
    """Copy the reports of a run that goes back to an older checkpoint, which shortens them."""
    folder = output_dir / OLDER_RUNS / owner.run
    with _refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in reports:
            if (output_dir / name).is_file():
                shutil.copy2(output_dir / name, _free(folder / name))


def move_checkpoints(output_dir: Path, checkpoints: Sequence[Path]) -> None:
    """Move checkpoints into OLDER_RUNS, each into the folder of its run, and log where they are.

    Each move is one rename, so a process that is killed in between has moved some of them, and
    another start with the same options moves the rest.

    Args:
        output_dir: the output folder.
        checkpoints: folders directly in it.
    """
    moved: set[Path] = set()
    for path in checkpoints:
        folder = output_dir / OLDER_RUNS / (recorded_run_id(path) or UNKNOWN_RUN)
        with _refusing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            path.rename(_free(folder / path.name))
        moved.add(folder)
    if moved:
        logger.warning(
            "Moved %s, which was in the way of this run, to %s.",
            *(names(checkpoints), " and ".join(map(str, sorted(moved)))),
        )


def names(checkpoints: Sequence[Path]) -> str:
    """The names of some checkpoints, for messages: all of them, or the first and the last."""
    ordered = [path.name for path in checkpoints][::-1]  # the oldest first
    if len(ordered) > 3:
        return f"{len(ordered)} checkpoints from {ordered[0]} to {ordered[-1]}"
    return " and ".join(filter(None, [", ".join(ordered[:-1]), ordered[-1]]))


def _free(path: Path) -> Path:
    """The path, or one with a number at its end if something is there already."""
    number, free = 2, path
    while free.exists() or free.is_symlink():
        free = path.with_name(f"{path.name}.{number}")
        number += 1
    return free


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into one of ours; what was moved stays moved."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"overwrite_output_dir: nothing can be moved to {str(folder)!r} ({error.strerror}): "
            "move the checkpoints away by hand, or name another output_dir."
        ) from error
