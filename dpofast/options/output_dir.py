"""The folder that a run writes to."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from dpofast.errors import ConfigError


def make_output_dir(folder: str | Path, source: str = "") -> None:
    """Makes the output folder, and writes a file to it that is deleted at once.

    Args:
        folder: folder of the run.
        source: what the message begins with, such as the file that names the folder.

    Raises:
        ConfigError: the folder can't be made, or no file can be written to it.
    """
    begin = f"{source}: output_dir" if source else "output_dir"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{begin}: {str(folder)!r} can't be made: {error.strerror}.") from error
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise ConfigError(
            f"{begin}: no file can be written to {str(folder)!r}: {error.strerror}; name another "
            "folder, or make room."
        ) from error


def refuse_inputs_folder(
    folder: str | Path, inputs: Mapping[str, str | Path | None], source: str = ""
) -> None:
    """Refuses an output folder that is, or is inside, a folder that the run reads from.

    A model or a store inside the output folder is no harm: a run writes to other names.

    Args:
        folder: folder of the run.
        inputs: what each folder is, in words for the message, and its path. A name on the hub is
            no folder, and is passed over.
        source: what the message begins with, such as the file that names the folder.

    Raises:
        ConfigError: the run would overwrite or mix with what it reads; names both folders.
    """
    begin = f"{source}: output_dir" if source else "output_dir"
    own = Path(folder).expanduser().resolve()
    for what, given in inputs.items():
        if not given or not Path(given).expanduser().exists():
            continue
        other = Path(given).expanduser().resolve()
        if own == other or other in own.parents:
            relation = "is" if own == other else "is inside"
            raise ConfigError(
                f"{begin}: {str(folder)!r} {relation} the folder of {what} ({str(given)!r}), whose "
                "files a run must not overwrite or be mixed with; name another folder."
            )
