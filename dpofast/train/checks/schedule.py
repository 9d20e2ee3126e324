"""Finds out before anything is scored whether the optimizer and its schedule can be made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import EarlyStoppingCallback, SchedulerType, get_scheduler

from dpofast.errors import ConfigError, one_line


def check_schedule(trainer: Any, total_steps: int) -> None:
    """Look up the optimizer, and make the schedule for an optimizer of one number.

    Args:
        trainer: the trainer; an optimizer or schedule that it was given is not looked at, nor are
            those that DeepSpeed makes.
        total_steps: optimizer steps of the run.

    Raises:
        ConfigError: one of them can't be made, or early stopping can't work with the options.
    """
    args = trainer.args
    if not trainer.is_deepspeed_enabled:
        if trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None:
            with _refusing(f"optim: {args.optim.value} can't be used"):
                trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        if trainer.lr_scheduler is None:
            kwargs = f" with lr_scheduler_kwargs {own}" if (own := args.lr_scheduler_kwargs) else ""
            name = SchedulerType(args.lr_scheduler_type).value
            with _refusing(f"lr_scheduler_type: {name} can't be used{kwargs}"):
                get_scheduler(
                    args.lr_scheduler_type,
                    optimizer=torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate),
                    num_warmup_steps=args.get_warmup_steps(total_steps),
                    num_training_steps=total_steps,
                    scheduler_specific_kwargs=args.lr_scheduler_kwargs,
                )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            # It only compares the options with each other here.
            with _refusing("EarlyStoppingCallback can't be used"):
                callback.on_train_begin(args, trainer.state, trainer.control)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turns any failure inside the `with` block into one sentence."""
    try:
        yield
    except Exception as error:  # packages of optimizers can raise anything
        raise ConfigError(f"{what} ({type(error).__name__}: {one_line(error)}).") from error
