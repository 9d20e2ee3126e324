"""The part of DPOTrainer that saves a checkpoint and ends the run at a signal."""

from __future__ import annotations

import functools
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers import Trainer, TrainerControl

from dpofast.errors import StoppedBySignal
from dpofast.options.config import DPOConfig
from dpofast.options.save_signals import watched_signals
from dpofast.ranks.watch import note_stop
from dpofast.train.signals.watch import SAME_SECONDS, SignalWatch

logger = logging.getLogger(__name__)

EVALUATION_STEPS = 8  # evaluation steps between two votes; each vote makes the host wait


class EvaluationStoppedError(Exception):
    """A signal has stopped an evaluation within the training; the resumed run repeats it."""


class StopsOnSignals(Trainer):
    """Makes a transformers Trainer save a checkpoint and end at a signal, on all ranks together.

    `VotesOnSteps` makes the ranks agree before each optimizer step. After that step the checkpoint
    is saved, and `train` raises StoppedBySignal, or KeyboardInterrupt for Ctrl-C. None of what ends
    a finished run is done. An evaluation that is due is left to the resumed run, since schedulers
    give only seconds.

    Attributes:
        signals: catches the signals while `train` runs; None otherwise.
    """

    args: DPOConfig
    control: TrainerControl
    received_signal: signal.Signals | None
    stopping_signal: signal.Signals | None
    signals: SignalWatch | None = None  # only while `train` runs
    _whole: tuple[int, int] | None = None  # the place of the last whole checkpoint of this call
    _passed_step: int | None = None  # the last step whose end has been handled
    _evaluation_steps = 0

    @contextmanager
    def watching_signals(self) -> Iterator[None]:
        """Inside the `with` block, the signals of the options end the run as described above."""
        self.received_signal = self.stopping_signal = self._whole = self._passed_step = None
        watched = watched_signals(self.args.save_on_signal)
        self.signals = SignalWatch(watched, self._note_signal, self._say_signal)
        try:
            with self.signals as watch:
                yield
            if watch.received is not None:
                logger.warning(
                    "%s came after the last step, which ends the run.", watch.received.name
                )
        except StoppedBySignal as stopped:
            note_stop(stopped)
            raise
        finally:
            self.signals = None

    def _note_signal(self, received: signal.Signals) -> None:
        self.received_signal = received

    def _say_signal(self, received: signal.Signals) -> None:
        if not self.is_world_process_zero():
            return
        if self.signals is not None and self.signals.only_notes:
            logger.warning(
                "%s: the run saves a checkpoint after this step and ends. A second signal, at "
                "least %g s later, ends it at once.",
                received.name,
                SAME_SECONDS,
            )
        else:
            logger.warning("%s: the run ends before its first step.", received.name)

    def training_begins(self) -> None:
        """From the first step on, a signal is only noted, and acted on after a step."""
        if self.signals is not None:
            self.signals.only_notes = True

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        control = self.control
        is_long = control.should_evaluate or control.should_save
        is_owed = control.should_evaluate
        if self.stopping_signal is not None:
            control.should_evaluate = control.should_save = False
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationStoppedError:
            pass
        else:
            if self.stopping_signal is not None:
                self.control.should_evaluate = is_owed
            elif is_long:  # a signal may have come meanwhile; the next vote is a step away
                self._vote_on_signal()
        # What is due at the end of an epoch comes in a second call for its last step. A resumed run
        # begins with the next epoch, and so would never do it.
        step, epoch = self.state.global_step, self.state.epoch
        is_called_again = step != self._passed_step and epoch is not None and epoch == int(epoch)
        self._passed_step = step
        if self.stopping_signal is not None and not is_called_again:
            self._end_at_signal(self.stopping_signal, model, trial)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationStoppedError:
            torch.set_rng_state(state)  # its loader has drawn a number, and will draw it again
            raise

    def _evaluate_step(self, *args: Any) -> None:
        # A callback's own evaluation runs to its end, and so do further sets of pairs: the metrics
        # of the first one are in the logs already.
        if self.signals is not None and self.signals.only_notes and self.control.should_evaluate:
            self._evaluation_steps += 1
            if self._evaluation_steps % EVALUATION_STEPS == 0:
                self._vote_on_signal()
                if self.stopping_signal is not None:
                    raise EvaluationStoppedError
        super()._evaluate_step(*args)

    def _vote_on_signal(self) -> None:
        """Let a signal that any rank has received stop the run; all ranks must call this."""
        own = 0 if self.received_signal is None else int(self.received_signal)
        votes = torch.tensor([own], device=self.args.device)
        highest = int(self.accelerator.gather(votes).max())
        if highest:
            self.stopping_signal = signal.Signals(highest)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if not self.args.save_only_model:
            self._whole = self._place()

    def _place(self) -> tuple[int, int]:
        """Changes with all that a checkpoint would hold anew."""
        return self.state.global_step, len(self.state.log_history)

    def _end_at_signal(self, received: signal.Signals, model: Any, trial: Any) -> None:
        """Save a whole checkpoint, unless there is one that knows all, and end the run."""
        step = self.state.global_step
        if self._whole != self._place() or self.control.should_evaluate:
            self.control.should_save = True
            with self._saving_all():
                self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        # A launcher ends all ranks when the first one has ended.
        self.accelerator.wait_for_everyone()
        self.is_in_train = False
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
        if self.is_world_process_zero():
            logger.warning(
                "%s: the run ends after step %d of %d; its checkpoint is %s. With "
                "resume_from_checkpoint: auto the same command goes on from there.",
                received.name,
                step,
                self.state.max_steps,
                folder,
            )
        if received is signal.SIGINT:
            raise KeyboardInterrupt
        raise StoppedBySignal(received, str(folder))

    @contextmanager
    def _saving_all(self) -> Iterator[None]:
        """Inside the `with` block, checkpoints are whole, whatever save_only_model says."""
        given = self.args.save_only_model
        self.args.save_only_model = False
        try:
            yield
        finally:
            self.args.save_only_model = given

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        # Here, as creating a loader draws a random number: the draws come as in an unbroken run.
        recorded: Any = self.state.stateful_callbacks.get("TrainerControl", {})
        if checkpoint is not None and recorded.get("args", {}).get("should_evaluate"):
            metrics = self._evaluate(None, None)
            self._determine_best_metric(metrics=metrics, trial=None)


T = TypeVar("T", bound=StopsOnSignals)
P = ParamSpec("P")
R = TypeVar("R")


def ends_at_signals(train: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """Decorator of `train`: signals end it as `StopsOnSignals` says."""

    @functools.wraps(train)
    def watched(trainer: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with trainer.watching_signals():
            return train(trainer, *args, **kwargs)

    return watched
