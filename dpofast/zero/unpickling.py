"""Reads the pickled files of a checkpoint without running code that somebody has put there.

DeepSpeed reads its files with `weights_only=False`, so a pickle in them may call any function.
PyTorch's own switch, the environment variable TORCH_FORCE_WEIGHTS_ONLY_LOAD, turns that off
wherever `torch.load` is called: its restricted unpickler then knows tensors, plain containers and
the classes that are allowed here, and refuses everything else before it is imported.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dpofast.errors import CheckpointError, one_line

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_TAG_FILES = ("latest", "latest_universal")
# What PyTorch's restricted unpickler says about a class or function that it doesn't know.
_UNKNOWN = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module \S+ is blocked)")
_REFUSED = re.compile(r"weights_only|Weights only|Unsupported operand")


def deepspeed_classes() -> list[type]:
    """The classes that DeepSpeed's checkpoints hold: settings and numbers, without code of a file.

    Their constructors and states only set attributes.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextlib.contextmanager
def reading_checkpoint(checkpoint: str, trust: bool, is_deepspeed: bool) -> Iterator[None]:
    """Inside the `with` block, `torch.load` runs no code of a file.

    Args:
        checkpoint: folder that is read.
        trust: let DeepSpeed's files, which are read with weights_only=False, hold any class.
        is_deepspeed: the checkpoint was written by DeepSpeed.

    Raises:
        CheckpointError: a file that can't be read, or needs a class that isn't allowed.
    """
    with contextlib.ExitStack() as stack:
        if is_deepspeed:
            _check_tags(Path(checkpoint))
            known = torch.serialization.get_safe_globals()
            added: list[Any] = [item for item in deepspeed_classes() if item not in known]
            stack.enter_context(torch.serialization.safe_globals(added))
        if not trust:
            stack.enter_context(_forced())
        try:
            yield
        except Exception as error:
            file = _file_of(error.__traceback__)
            if file is None:
                raise
            # transformers reads its own files with weights_only=True, whether or not we trust them.
            by_deepspeed = is_deepspeed and Path(file).parent != Path(checkpoint)
            raise CheckpointError(_sentence(file, error, by_deepspeed and not trust)) from error


@contextlib.contextmanager
def _forced() -> Iterator[None]:
    """Makes `torch.load` read with weights_only=True, whatever its caller asks for."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _check_tags(checkpoint: Path) -> None:
    """DeepSpeed reads the folder that these files name, which must be one of this checkpoint."""
    for file in (checkpoint / name for name in _TAG_FILES):
        if not file.is_file():
            continue
        tag = file.read_text(encoding="utf-8", errors="replace").strip()
        if tag in ("", ".", "..") or Path(tag).name != tag or "\\" in tag or "\0" in tag:
            raise CheckpointError(
                f"{file} names {tag[:100]!r} as the folder with DeepSpeed's files, which isn't a "
                "folder of this checkpoint; resume from another one."
            )


def _file_of(traceback: TracebackType | None) -> str | None:
    """The file that `torch.load` was reading when an error was raised; None if it wasn't called."""
    found: Any = None
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_globals.get("__name__") == "torch.serialization" and (
            frame.f_code.co_name == "load"
        ):
            found = frame.f_locals.get("f")
        traceback = traceback.tb_next
    if found is None or isinstance(found, (str, os.PathLike)):
        return None if found is None else str(found)
    return str(getattr(found, "name", "a file of the checkpoint"))


def _sentence(file: str, error: Exception, trust_helps: bool) -> str:
    """What is wrong with a file that `torch.load` couldn't read, and what to do."""
    message = str(error)
    if isinstance(error, FileNotFoundError):
        return f"{file} is missing from the checkpoint; resume from another one."
    unknown = _UNKNOWN.search(message)
    if unknown is None and not _REFUSED.search(message):
        return f"{file} can't be read ({one_line(error)[:300]}); resume from another checkpoint."
    what = "holds a pickle that a checkpoint doesn't need"
    if unknown is not None:
        what = f"holds the class or function {unknown[1]}, which a checkpoint doesn't need"
    stop = f"{file} {what}. Such a pickle can run code, so it isn't read. "
    if trust_helps:
        return stop + (
            "If nobody else could have written to this checkpoint, set trust_checkpoint: true; "
            "else resume from another one."
        )
    return stop + (
        "Resume from another checkpoint. If the class is your own, allow it in your script with "
        "torch.serialization.add_safe_globals."
    )
