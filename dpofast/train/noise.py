"""Refuses a policy that is random in training mode, before hours go into scoring its reference."""

from __future__ import annotations

import logging
from typing import Any

from dpofast.errors import ModelError
from dpofast.model.dropout import RANDOM, dropouts
from dpofast.model.parts import causal_lm
from dpofast.model.randomness import random_modules
from dpofast.zero.blocks import runnable

logger = logging.getLogger(__name__)


def check_noise(trainer: Any) -> None:
    """Run the policy of a DPOTrainer on a few tokens, twice and more, and compare.

    Dropouts that are wanted (disable_dropout: false) are no reason to stop. Noise that
    `disable_dropout` doesn't know is marked, if it is wanted, so that `dropouts` finds it.

    Raises:
        ModelError: a module is random although disable_dropout is set; it is named.
    """
    model = trainer.model
    has_engine = trainer.is_deepspeed_enabled and trainer.model_wrapped is not model
    if has_engine or next(dropouts(model), None):
        return
    with runnable(trainer):
        found = random_modules(model)
    for name, module in found.items():
        noise = f"{type(module).__name__} ({name}) of {type(causal_lm(model)).__name__}"
        if trainer.args.disable_dropout:
            raise ModelError(
                f"{noise} draws random numbers in training mode, and dpofast doesn't know how to "
                "switch that off: policy and reference would differ by noise. Set the noise to 0 "
                "in the model's config, or disable_dropout: false to train with it."
            )
        setattr(module, RANDOM, True)
        logger.info("%s draws random numbers in training mode.", noise)
