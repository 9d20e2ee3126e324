"""Reads the options of commands that run a model, once PyTorch knows how to keep a GPU's memory."""

from __future__ import annotations

import logging
import os
import sys

from dpofast.cli.run_options import RunOptions, read_options

logger = logging.getLogger(__name__)

# Rows of many lengths leave gaps in a GPU's memory, unless the pieces that PyTorch takes can grow.
SETTING = "expandable_segments:True"
VARIABLE = "PYTORCH_ALLOC_CONF"
# The names under which a user can have said how memory is kept.
VARIABLES = (VARIABLE, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def read_device_options(yaml_file: str | None, overrides: list[str]) -> RunOptions:
    """Read the options, and let the memory of a CUDA device grow in place if the run uses one.

    What the user says in the environment stays as it is.
    """
    is_ours = _can_grow() and not any(name in os.environ for name in VARIABLES)
    if is_ours:
        # PyTorch reads this when it first uses the device, which reading the options can do.
        os.environ[VARIABLE] = SETTING
    options = read_options(yaml_file, overrides)
    if is_ours and options.config.device.type == "cuda":
        logger.info(
            "GPU memory: %s=%s, as rows differ in length; set %s for another choice.",
            *(VARIABLE, SETTING, VARIABLE),
        )
    elif is_ours:
        del os.environ[VARIABLE]
    return options


def _can_grow() -> bool:
    """Whether there is a device whose memory PyTorch can let grow."""
    import torch

    return sys.platform == "linux" and torch.version.hip is None and torch.cuda.is_available()
