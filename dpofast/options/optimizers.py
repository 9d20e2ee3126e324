"""Which of transformers' optimizers a run can use."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers.training_args import OptimizerNames

from dpofast.errors import ConfigError

# Optimizers that get the learning rate in the backward pass, and update the weights there.
IN_BACKWARD = ("lomo", "adalomo")
OF_BITSANDBYTES = ("paged_", "ademamix", "adamw_8bit", "adamw_bnb_8bit", "lion_", "rmsprop_bnb")


def check_optimizer(optim: Any, use_cpu: bool) -> None:
    """Refuse an optimizer that can't work here, before anything is loaded.

    Args:
        optim: the option `optim`.
        use_cpu: whether the run leaves the GPU alone.

    Raises:
        ConfigError: there is no such optimizer, or it can't train here.
    """
    name = str(getattr(optim, "value", optim))
    if name not in {each.value for each in OptimizerNames}:
        raise ConfigError(
            f"optim: transformers has no optimizer {name!r}; make it yourself, and pass it as "
            "DPOTrainer(optimizers=(optimizer, None))."
        )
    if name in IN_BACKWARD:
        raise ConfigError(
            f"optim: {name!r} isn't supported, as it updates the weights in each micro-batch's "
            "backward pass; use adafactor or adamw_8bit to save memory."
        )
    if not name.startswith(OF_BITSANDBYTES):
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optim: {name!r} needs bitsandbytes: pip install 'dpofast[bitsandbytes]'."
        )
    if name.startswith("paged_") and (use_cpu or not torch.cuda.is_available()):
        raise ConfigError(
            f"optim: {name!r} keeps its states in memory that only CUDA has; on a CPU use "
            f"{name.removeprefix('paged_')}."
        )
