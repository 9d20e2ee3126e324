"""Refuses a policy that is random in training mode, before hours go into scoring its reference."""

from __future__ import annotations

import logging
from typing import Any

from dpofast.errors import ModelError
from dpofast.model.dropout import is_random, mark_random
from dpofast.model.parts import causal_lm

logger = logging.getLogger(__name__)


def check_noise(trainer: Any) -> None:
    """Stop a run whose policy is random in training mode; `RunReference.settle` has looked for it.

    Dropouts that are wanted (disable_dropout: false) are no reason to stop. Noise that
    `disable_dropout` doesn't know is marked, if it is wanted, so that `dropouts` finds it.

    Args:
        trainer: a DPOTrainer that is about to train.

    Raises:
        ModelError: a module is random although disable_dropout is set; it is named.
    """
    trainer.reference.settle()
    for name, module in trainer.reference.random_modules.items():
        noise = f"{type(module).__name__} ({name}) of {type(causal_lm(trainer.model)).__name__}"
        if trainer.args.disable_dropout:
            raise ModelError(
                f"{noise} draws random numbers in training mode, and dpofast doesn't know how to "
                "switch that off: policy and reference would differ by noise. Set the noise to 0 "
                "in the model's config, or disable_dropout: false to train with it."
            )
        if not is_random(module):
            mark_random(module)
            logger.info("%s draws random numbers in training mode.", noise)
