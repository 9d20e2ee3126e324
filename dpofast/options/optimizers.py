"""Which of transformers' optimizers a run can use."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers.training_args import OptimizerNames

from dpofast.errors import ConfigError

# Endings of optimizers that update the weights in the backward pass, and what to take instead. Each
# micro-batch of a step has a backward pass, and all but the first would run with other weights.
IN_BACKWARD = {
    "lomo": "adafactor or adamw_8bit to save memory",
    "_layerwise": "{0}, which updates them once in a step",
}
# Where the optimizer without pages has another name than the rest of this one.
WITHOUT_PAGES = {"paged_adamw_32bit": "adamw_torch", "paged_ademamix_32bit": "ademamix"}
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
    for ending, instead in IN_BACKWARD.items():
        if name.endswith(ending):
            raise ConfigError(
                f"optim: {name!r} isn't supported, as it updates the weights in each "
                f"micro-batch's backward pass; use {instead.format(name.removesuffix(ending))}."
            )
    if name.startswith("paged_") and (use_cpu or not torch.cuda.is_available()):
        without_pages = WITHOUT_PAGES.get(name, name.removeprefix("paged_"))
        raise ConfigError(
            f"optim: {name!r} keeps its states in memory that only CUDA has; on a CPU use "
            f"{without_pages}."
        )
    if name.startswith(OF_BITSANDBYTES) and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optim: {name!r} needs bitsandbytes: pip install 'dpofast[bitsandbytes]'."
        )
