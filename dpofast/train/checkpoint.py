"""What a checkpoint holds beside transformers' own files, and which checkpoint is whole."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpofast.errors import ConfigError, ReferenceStoreError

logger = logging.getLogger(__name__)

STATE_FILE = "dpofast_state.json"
# transformers writes this one last.
TRAINER_STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class RunState:
    """What a resumed run can't tell from its options.

    Attributes:
        reference_digest: of the reference's identity.
        reference_description: the same in words.
        reference_store: folder that held its log-probs; None if they weren't kept.
        row_tokens: most tokens of a packed row; None where rows are padded.
    """

    reference_digest: str
    reference_description: dict[str, Any]
    reference_store: str | None
    row_tokens: int | None = None

    def save(self, checkpoint: str | Path) -> None:
        text = json.dumps(asdict(self), indent=2)
        folder = Path(checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STATE_FILE).write_text(text + "\n", encoding="utf-8")


def load_run_state(checkpoint: str | Path) -> RunState:
    """What `RunState.save` wrote.

    Raises:
        ReferenceStoreError: the checkpoint has none, so its reference isn't known.
    """
    path = Path(checkpoint) / STATE_FILE
    try:
        return RunState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ReferenceStoreError(
            f"{path} can't be read ({error}), so the reference that this checkpoint was trained "
            "against isn't known: resume from a checkpoint that dpofast wrote, or start a new run "
            "from it without resuming."
        ) from error


def refuse_finished(checkpoint: str, max_steps: int) -> None:
    """Raise ConfigError at a checkpoint with nothing left to train: it would get a step too many.

    Args:
        checkpoint: folder of a whole checkpoint.
        max_steps: optimizer steps of the whole run.
    """
    step = _saved_step(Path(checkpoint))
    if step is not None and step >= max_steps:
        raise ConfigError(
            f"resume_from_checkpoint: {checkpoint!r} stands at step {step} of {max_steps}, so this "
            "run is finished; raise num_train_epochs or max_steps to train on."
        )


def _saved_step(checkpoint: Path) -> int | None:
    """The step of a whole checkpoint; None where its last file is missing or was cut short."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def resolve_checkpoint(resume: str | bool | None, output_dir: str) -> str | None:
    """The folder to resume from; `True` means the newest whole checkpoint of `output_dir`.

    A run that was killed while saving leaves a checkpoint without its last file.

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
    folders = [
        path
        for path in Path(output_dir).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    for path in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if _saved_step(path) is not None:
            return str(path)
        logger.warning("%s was not saved to its end; an older checkpoint is looked for.", path)
    raise ConfigError(
        f"resume_from_checkpoint: there is no whole checkpoint in {output_dir!r}; "
        "leave the option out to start from the beginning."
    )
