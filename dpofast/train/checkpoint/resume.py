"""Chooses the checkpoint that a run resumes from, and refuses one that it can't resume from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from dpofast.errors import ConfigError

logger = logging.getLogger(__name__)

# transformers writes this file last, so a checkpoint that has it is whole.
TRAINER_STATE_FILE = "trainer_state.json"


def resolve_checkpoint(resume: str | bool | None, output_dir: str) -> str | None:
    """The folder of the checkpoint to resume from.

    Args:
        resume: a checkpoint's folder; True for the newest whole checkpoint of `output_dir`; None or
            False to start from the beginning.
        output_dir: the run's output folder.

    Returns:
        The folder, or None to start from the beginning.

    Raises:
        ConfigError: the folder isn't a whole checkpoint, or there is none to resume from.
    """
    if not resume:
        return None
    if isinstance(resume, (str, Path)):
        if _saved_step(Path(resume)) is None:
            raise ConfigError(
                f"resume_from_checkpoint: {str(resume)!r} is not a whole checkpoint, as it has no "
                f"{TRAINER_STATE_FILE} that can be read; name another one."
            )
        return str(resume)
    for path in _checkpoints(Path(output_dir)):
        # A run that was killed while saving leaves a checkpoint without its last file.
        if _saved_step(path) is not None:
            return str(path)
        logger.warning("%s was not saved to its end; an older checkpoint is looked for.", path)
    raise ConfigError(
        f"resume_from_checkpoint: there is no whole checkpoint in {output_dir!r}; "
        "leave the option out to start from the beginning."
    )


def newest_saved(output_dir: Path) -> Path | None:
    """The newest checkpoint of a folder that was saved to its end; None if there is none."""
    saved = (path for path in _checkpoints(output_dir) if _saved_step(path) is not None)
    return next(saved, None)


def refuse_finished(checkpoint: str, max_steps: int) -> None:
    """Refuses a checkpoint of a finished run: transformers would train one step too many.

    Args:
        checkpoint: folder of a whole checkpoint.
        max_steps: optimizer steps of the whole run.

    Raises:
        ConfigError: the checkpoint has reached `max_steps`.
    """
    step = _saved_step(Path(checkpoint))
    if step is not None and step >= max_steps:
        raise ConfigError(
            f"resume_from_checkpoint: {checkpoint!r} stands at step {step} of {max_steps}, so this "
            "run is finished; raise num_train_epochs or max_steps to train on."
        )


def _checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a folder, whole or not, the newest first."""
    folders = [
        path
        for path in output_dir.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _saved_step(checkpoint: Path) -> int | None:
    """The step of a whole checkpoint; None if its last file is missing or was cut short."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
