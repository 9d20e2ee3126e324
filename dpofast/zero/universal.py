"""Checkpoints of ZeRO on another number of ranks: DeepSpeed's universal checkpoints."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from torch import Tensor

LATEST = "latest_universal"  # the converter writes it last, with the name of its folder in it
SUFFIX = "_universal"


def is_converted(checkpoint: str | Path) -> bool:
    """Whether a checkpoint also has its states in DeepSpeed's universal form."""
    latest = Path(checkpoint) / LATEST
    try:
        folder = latest.parent / latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return False
    return (folder / "zero").is_dir()


def conversion(checkpoint: str | Path) -> str:
    """The shell command that adds the universal form to a checkpoint.

    Args:
        checkpoint: folder of a checkpoint that was written under DeepSpeed.
    """
    folder = Path(checkpoint)
    latest = folder / "latest"
    tag = "global_step*"
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    source, target = (shlex.quote(str(folder / name)) for name in (tag, tag + SUFFIX))
    return (
        "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state "
        f"--input_folder {source} --output_folder {target}"
    )


def load_universal(config: dict[str, Any], is_on: bool) -> None:
    """Say in a configuration in which form the engine reads a checkpoint.

    Args:
        config: DeepSpeed configuration, changed in place.
        is_on: whether it reads the universal form.
    """
    config.setdefault("checkpoint", {})["load_universal"] = is_on


def own_steps(optimizer: Any) -> None:
    """Give each state of an optimizer that has read the universal form a step count of its own.

    ZeRO-3 reads one tensor and hands it to all states. Each of them adds 1 to it in place, so the
    count of steps, by which Adam corrects its averages, would grow several times too fast.

    Args:
        optimizer: PyTorch's optimizer inside DeepSpeed's.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def end_universal(engine: Any) -> None:
    """Let an engine read the usual form again, as that of the best checkpoint after training."""
    engine.load_universal_checkpoint = lambda: False
