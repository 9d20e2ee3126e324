"""Decides where a run begins in its output folder: anew, or at a checkpoint, and as which run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dpofast.errors import CheckpointError, ConfigError
from dpofast.train.checkpoint.aside import (
    OLDER_RUNS,
    copy_reports,
    move_checkpoints,
    move_reports,
    names,
)
from dpofast.train.checkpoint.manifest import Manifest, ManifestError
from dpofast.train.checkpoint.resume import (
    PassedOver,
    check_named,
    in_words,
    newest_whole,
    recorded_run_id,
    report_passed_over,
    step_folders,
    why_not_whole,
)
from dpofast.train.checkpoint.run_id import RUN_FILE, Run, new_run, read_run, write_run

AUTO = "auto"
_SPELLINGS = {"true": True, "false": None, "none": None, "": None, AUTO: AUTO}


@dataclass(frozen=True)
class Folder:
    """An output folder, and what the options say about it.

    Attributes:
        path: the folder.
        saves: whether the run will save checkpoints.
        overwrite: move checkpoints that are in the way aside, if the run saves its own.
        verify: compare the hashes of a checkpoint's files.
        on_all_nodes: if each node has a folder of its own and the newest checkpoint is looked for,
            those that all nodes have, by step; see `whole_on_all_nodes`. None otherwise.
    """

    path: Path
    saves: bool
    overwrite: bool
    verify: bool
    on_all_nodes: Mapping[int, str | None] | None = None


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: folder of the checkpoint to resume from; None for a fresh run.
        run: the run that goes on or begins.
        is_new: whether the run begins here: it is fresh, or goes on from another run's checkpoint.
        is_newest: whether the checkpoint is the newest whole one of its run.
        in_the_way: checkpoints in the output folder that the run would overwrite or be mixed with,
            the newest first.
        passed_over: for a fresh run that auto begins, the checkpoints that it can't go on from,
            each with the reason.
    """

    checkpoint: Path | None
    run: Run
    is_new: bool
    is_newest: bool = False
    in_the_way: Sequence[Path] = ()
    passed_over: PassedOver = field(default_factory=list)


def resume_point(given: Any) -> Any:
    """What resume_from_checkpoint means, which can be given as text.

    Returns:
        True for the newest checkpoint, AUTO for the newest if there is one, None to start from the
        beginning, or a checkpoint's folder.
    """
    if given is None or given is False:
        return None
    return _SPELLINGS.get(str(given).lower(), given)


def choose_start(given: Any, folder: Folder) -> Start:
    """Choose where a run begins. Nothing is written.

    Args:
        given: a checkpoint's folder, or True, "auto", None or False.
        folder: the output folder.

    Raises:
        CheckpointError: there is no whole checkpoint to resume from.
        ConfigError: checkpoints are in the way, and may not be moved.
    """
    point = resume_point(given)
    if point is None:
        start = Start(None, new_run(), is_new=True)
    elif point is True or point == AUTO:
        start = _at_newest(folder, is_needed=point is True)
    else:
        start = _at_named(Path(point), folder)
    return on_this_node(start, folder)


def on_this_node(start: Start, folder: Folder) -> Start:
    """The same start on another node, which has an output folder of its own.

    Args:
        start: what `choose_start` returned on another node.
        folder: the output folder of this node.

    Raises:
        ConfigError: checkpoints are in the way, and may not be moved.
    """
    start = replace(start, in_the_way=_in_the_way(start, folder.path))
    if start.in_the_way and folder.saves and not folder.overwrite:
        raise ConfigError(_refusal(start, folder))
    return start


def owner_of(output_dir: Path) -> Run | None:
    """The run that goes on in an output folder; None if there is none.

    Raises:
        CheckpointError: it can't be told.
    """
    return read_run(output_dir) or _only_run(output_dir)


def settle_start(start: Start, folder: Folder, reports: Sequence[str]) -> None:
    """Make an output folder ready for a run: what is in its way is moved, and its id is written.

    The id comes before the moves: a start that is killed in between leaves a folder in which no
    older run is taken for this one.

    Args:
        start: what `choose_start` returned.
        folder: the output folder.
        reports: names of the files in which a run reports.
    """
    try:
        owner = read_run(folder.path)
    except CheckpointError:
        owner = None
    moves = start.in_the_way if folder.overwrite and folder.saves else ()
    if moves and start.is_new:
        move_reports(folder.path, owner, reports, moves)
    elif moves:
        copy_reports(folder.path, start.run, reports)
    # A run that saves nothing leaves the folder to the one whose checkpoints are in it.
    is_guest = start.is_new and bool(start.in_the_way) and not moves
    if owner != start.run and not is_guest:
        try:
            write_run(folder.path, start.run)
        except OSError as error:
            raise CheckpointError(
                f"output_dir: {RUN_FILE} can't be written to {str(folder.path)!r} "
                f"({error.strerror}): make room, or name another folder."
            ) from error
    move_checkpoints(folder.path, moves)


def _at_newest(folder: Folder, is_needed: bool) -> Start:
    """The newest whole checkpoint of the folder's run; a fresh run if it isn't needed."""
    owner = owner_of(folder.path)
    if owner is None:
        chosen, passed_over = None, newest_whole(folder.path, "", folder.verify)[1]
    else:
        chosen, passed_over = newest_whole(
            folder.path, owner.run, folder.verify, folder.on_all_nodes
        )
    if chosen is not None:
        assert owner is not None
        report_passed_over(chosen, passed_over)
        return Start(chosen, owner, is_new=False, is_newest=True)
    if not is_needed:
        return Start(None, new_run(), is_new=True, passed_over=passed_over)
    found = f" ({in_words(passed_over)})" if passed_over else ""
    raise CheckpointError(
        f"resume_from_checkpoint: there is no whole checkpoint of this run in {str(folder.path)!r}"
        f"{found}; leave the option out to start from the beginning, set it to auto to start "
        "wherever there is nothing to resume from, or name a checkpoint's folder."
    )


def _only_run(output_dir: Path) -> Run | None:
    """The run of all checkpoints in a folder without RUN_FILE, as copied ones are."""
    runs = {run for run in map(recorded_run_id, step_folders(output_dir)) if run is not None}
    if len(runs) > 1:
        raise CheckpointError(
            f"resume_from_checkpoint: {str(output_dir)!r} holds checkpoints of {len(runs)} runs, "
            f"and has no {RUN_FILE} that says which of them goes on; name a checkpoint's folder."
        )
    return replace(new_run(), run=runs.pop()) if runs else None


def _at_named(checkpoint: Path, folder: Folder) -> Start:
    """A checkpoint that the user names; one of another folder begins a new run."""
    check_named(checkpoint, folder.path, folder.verify)
    run_id = recorded_run_id(checkpoint)
    is_own = checkpoint.resolve().parent == folder.path.resolve()
    if run_id is None or not is_own:
        return Start(checkpoint, new_run(), is_new=not is_own)
    try:
        owner = read_run(folder.path)
    except CheckpointError:  # which the checkpoint's own manifest replaces
        owner = None
    if owner is None or owner.run != run_id:
        owner = replace(new_run(), run=run_id)
    return Start(checkpoint, owner, is_new=False)


def _in_the_way(start: Start, output_dir: Path) -> list[Path]:
    """Checkpoints that a run would overwrite, or that would be taken for its own."""
    folders = step_folders(output_dir)
    if start.is_new:
        return folders
    assert start.checkpoint is not None
    own = start.checkpoint.resolve()
    step = next((_number(path) for path in folders if path.resolve() == own), 0)
    newer = [path for path in folders if _number(path) > step]
    # A damaged one of the run itself, which was passed over, may be replaced.
    own_damaged = {path for path in newer if _is_damaged(path, start.run.run, start.is_newest)}
    return [path for path in newer if path not in own_damaged]


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_damaged(checkpoint: Path, run_id: str, is_known: bool) -> bool:
    """Whether a checkpoint isn't whole, and isn't known to be another run's.

    Args:
        checkpoint: folder of the checkpoint.
        run_id: the run that goes on.
        is_known: whether all newer ones of the run were found damaged when they were compared.
    """
    try:
        manifest = Manifest.read(checkpoint)
    except ManifestError as error:
        return not error.is_missing
    if manifest.run_id != run_id:
        return False
    return is_known or why_not_whole(checkpoint, hashes=False) is not None


def _refusal(start: Start, output: Folder) -> str:
    output_dir, found, folder = output.path, names(start.in_the_way), str(output.path)
    aside = f"set overwrite_output_dir: true to move them to {str(output_dir / OLDER_RUNS)!r}"
    if start.passed_over:
        return (
            f"resume_from_checkpoint: auto can't go on from the checkpoints in {folder!r} "
            f"({in_words(start.passed_over)}), and a run from the beginning would overwrite or be "
            f"mixed with them: name another output_dir, or {aside}."
        )
    if start.checkpoint is None and output.on_all_nodes is not None:
        return (
            f"resume_from_checkpoint: {folder!r} holds {found}, but another node has none of them "
            "whole, and a run from the beginning would overwrite or be mixed with them: copy a "
            f"checkpoint's files to that node, name another output_dir, or {aside}."
        )
    if start.checkpoint is None:
        return (
            f"output_dir: {folder!r} holds {found} of an earlier run, which this one would "
            "overwrite or be mixed with: set resume_from_checkpoint: true to go on with that run, "
            f"name another output_dir, or {aside}."
        )
    if start.is_new:
        return (
            f"output_dir: {folder!r} holds {found}, which the run that goes on from "
            f"{str(start.checkpoint)!r} would overwrite or be mixed with: name another "
            f"output_dir, or {aside}."
        )
    return (
        f"resume_from_checkpoint: {folder!r} also holds {found}, which the run that goes on from "
        f"{start.checkpoint.name} would overwrite or be mixed with: set resume_from_checkpoint: "
        f"true to go on from the newest one of the run, name another output_dir, or {aside}."
    )
