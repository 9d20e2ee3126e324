"""The folder that a run writes to."""

from __future__ import annotations

import tempfile
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
