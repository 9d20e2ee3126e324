"""The id of the run that an output folder belongs to, by which its checkpoints are told apart."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from dpofast.errors import CheckpointError

RUN_FILE = "dpofast_run.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Run:
    """The content of an output folder's RUN_FILE; the field names are its keys.

    Attributes:
        run: id of the run, 32 hexadecimal digits; each of its checkpoints has it, too.
        started: when the run began, as an ISO date and time in UTC.
        format: version of the file.
    """

    run: str
    started: str
    format: int = FORMAT_VERSION


def new_run() -> Run:
    """A run that begins now, with an id of its own."""
    return Run(uuid.uuid4().hex, datetime.now(UTC).isoformat(timespec="seconds"))


def read_run(folder: str | Path) -> Run | None:
    """The run that an output folder belongs to; None if no run has begun there.

    Raises:
        CheckpointError: the file can't be read, or a newer version wrote it.
    """
    path = Path(folder) / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} was written by a newer version of dpofast: use that version, or another "
                "output_dir."
            )
        run = Run(content["run"], content["started"])
        if not isinstance(run.run, str) or not run.run.isalnum():
            raise ValueError(f"{run.run!r} is no id")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} can't be read ({error!r}), so it isn't known which run the folder belongs to: "
            "name a checkpoint's folder in resume_from_checkpoint, or delete the file."
        ) from error
    return run


def take_over(folder: str | Path, run_id: str) -> None:
    """Let an output folder belong to a run that has saved a checkpoint there as its guest.

    A run with save_strategy: no leaves the folder to an older run, until a signal makes it save.
    """
    try:
        owner = read_run(folder)
    except CheckpointError:  # nobody can say whose it was
        owner = new_run()
    if owner is not None and owner.run != run_id:
        write_run(folder, replace(new_run(), run=run_id))


def write_run(folder: str | Path, run: Run) -> None:
    """Write RUN_FILE into an output folder, so that it is there as a whole or as it was before."""
    path = Path(folder) / RUN_FILE
    unfinished = path.with_name(f".{RUN_FILE}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(run), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
