"""Chooses the checkpoint that a run resumes from, and refuses one that it can't resume from."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpofast.errors import CheckpointError
from dpofast.train.checkpoint.manifest import Manifest, ManifestError, verify

logger = logging.getLogger(__name__)

TRAINER_STATE_FILE = "trainer_state.json"
PREFIX = "checkpoint-"
NO_MANIFEST = (
    "it has no manifest: it was copied in part, or saved by a version before manifests, or not by "
    "dpofast"
)

PassedOver = list[tuple[Path, str]]


def step_folders(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-N` of a run's output folder, whole or not, the newest first."""
    folders = [
        path
        for path in Path(output_dir).glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdecimal() and path.is_dir()
    ]
    return sorted(folders, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def why_not_whole(folder: str | Path, run_id: str | None = None, hashes: bool = True) -> str | None:
    """Why a checkpoint isn't whole, as it is on the disk; None if it is.

    Args:
        folder: the checkpoint.
        run_id: the run that it must belong to; None for any.
        hashes: read all files and compare their hashes; otherwise only their sizes.

    Returns:
        A clause: "optimizer.pt is missing".
    """
    try:
        manifest = Manifest.read(Path(folder))
    except ManifestError as error:
        return NO_MANIFEST if error.is_missing else str(error)
    name = Path(folder).name
    if name.removeprefix(PREFIX).isdecimal() and name != f"{PREFIX}{manifest.step}":
        return f"it is the checkpoint of step {manifest.step}, under another name"
    if run_id is not None and manifest.run_id != run_id:
        return f"it belongs to another run, {manifest.run_id}"
    faults = verify(folder, hashes)
    if not faults:
        return None
    more = f" (and {len(faults) - 1} more of its files are damaged)" if len(faults) > 1 else ""
    return f"{faults[0]}{more}"


def why_not_resumed(
    folder: str | Path, run_id: str | None = None, hashes: bool = True
) -> str | None:
    """Why a run can't resume from a checkpoint; None if it can. As `why_not_whole` otherwise."""
    reason = why_not_whole(folder, run_id, hashes)
    if reason is None and not Manifest.read(Path(folder)).has_training_state:
        return "it has only a model, as save_only_model was set"
    return reason


def newest_whole(
    output_dir: str | Path,
    run_id: str | None,
    verify: bool = True,
    on_all_nodes: Mapping[int, str | None] | None = None,
) -> tuple[Path | None, PassedOver]:
    """The newest checkpoint of a run that is whole.

    Args:
        output_dir: the run's output folder.
        run_id: the run; None for any.
        verify: compare the hashes of all files, not only their sizes.
        on_all_nodes: if each node has a folder of its own, what `whole_on_all_nodes` returned; it
            has verified the parts of all nodes. None if they share one.

    Returns:
        The folder, None if there is none, and the newer folders with the reason why each was
        passed over.
    """
    passed_over: PassedOver = []
    for folder in step_folders(output_dir):
        reason = why_not_resumed(folder, run_id, verify and on_all_nodes is None)
        if reason is None and on_all_nodes is not None:
            step = Manifest.read(folder).step
            reason = on_all_nodes.get(step, "another node has no such checkpoint that is whole")
        if reason is None:
            return folder, passed_over
        passed_over.append((folder, reason))
    return None, passed_over


def report_passed_over(chosen: Path | None, passed_over: PassedOver) -> None:
    """Log in one line which newer checkpoints were passed over, and why."""
    if passed_over:
        instead = "" if chosen is None else f"; the run resumes from {chosen.name} instead"
        logger.warning("Passed over %s%s.", in_words(passed_over), instead)


def in_words(passed_over: Sequence[tuple[Path, str]]) -> str:
    """The checkpoints that were passed over, each with its reason, as the part of a sentence."""
    return "; ".join(f"{folder}: {reason}" for folder, reason in passed_over)


def check_named(folder: str | Path, output_dir: str | Path, verify: bool = True) -> None:
    """Check the checkpoint that resume_from_checkpoint names.

    Args:
        folder: the checkpoint, of any run.
        output_dir: the run's output folder, where another one could be taken from.
        verify: compare it with its manifest, which it must have. Otherwise it is enough that
            trainer_state.json can be read.

    Raises:
        CheckpointError: the checkpoint isn't whole; names the file.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"resume_from_checkpoint: there is no folder {str(folder)!r}; give the folder of a "
            "checkpoint, or true or auto for the newest one in output_dir."
        )
    if not verify:
        if saved_step(folder) is None:
            raise CheckpointError(
                f"resume_from_checkpoint: {str(folder)!r} is not a whole checkpoint, as it has no "
                f"{TRAINER_STATE_FILE} that can be read; name another one."
            )
        return
    reason = why_not_resumed(folder)
    if reason is None:
        return
    if reason == NO_MANIFEST:
        remedy = "set verify_checkpoint: false to resume from it unchecked, or name another one"
        if saved_step(folder) is None:
            inside = step_folders(folder)
            remedy = f"name one in it, such as {str(inside[0])!r}" if inside else "name another one"
    else:
        older = [
            path
            for path in step_folders(output_dir)
            if path.resolve() != Path(folder).resolve() and why_not_resumed(path) is None
        ]
        names = f"{str(older[0])!r}, which is whole" if older else "another one"
        remedy = f"name {names}"
    raise CheckpointError(
        f"resume_from_checkpoint: {str(folder)!r} is not a whole checkpoint: {reason}; {remedy}."
    )


def check_best(folder: str | Path) -> None:
    """Check the checkpoint whose weights load_best_model_at_end takes.

    Raises:
        CheckpointError: it isn't whole; names the file.
    """
    reason = why_not_whole(folder)
    if reason is not None:
        raise CheckpointError(
            f"load_best_model_at_end: the best checkpoint, {str(folder)!r}, is not whole: {reason}"
            "; set load_best_model_at_end: false and resume_from_checkpoint: true to keep the "
            "model of the last step instead."
        )


def recorded_run_id(checkpoint: str | Path) -> str | None:
    """The id of the run that saved a checkpoint; None if it has no manifest that can be read."""
    try:
        return Manifest.read(Path(checkpoint)).run_id
    except ManifestError:
        return None


def saved_step(checkpoint: str | Path) -> int | None:
    """The step of a checkpoint, read from trainer_state.json; None if that can't be read."""
    try:
        state = json.loads((Path(checkpoint) / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
