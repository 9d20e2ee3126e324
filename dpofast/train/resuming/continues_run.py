"""The part of DPOTrainer that makes a resumed run the same run as before."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerControl
from transformers.trainer_callback import ExportableState

from dpofast.options.allowed_changes import LIMITS, SCHEDULED, read_allowed
from dpofast.options.config import DPOConfig
from dpofast.train.checkpoint.resume import recorded_run_id
from dpofast.train.checkpoint.run_state import RunState
from dpofast.train.checkpoint.same_run import Change, Changes, compare
from dpofast.train.checkpoint.staging import list_files, missing_of_ranks
from dpofast.train.data.training_set import TrainingSet
from dpofast.train.exchange import exchange
from dpofast.train.reference.run_reference import AUTOCAST_DTYPES, RunReference
from dpofast.train.reports.keeps_sums import KeepsSums
from dpofast.train.resuming.run_facts import (
    data_facts,
    given_facts,
    model_facts,
    option_facts,
    version_facts,
)
from dpofast.zero.universal import (
    conversion,
    end_universal,
    is_converted,
    load_universal,
    own_steps,
)

logger = logging.getLogger(__name__)

# Entries of the optimizer's parameter groups that options decide.
ENTRIES = {
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_epsilon": ("eps",),
    "weight_decay": ("weight_decay",),
}


class ContinuesRun(KeepsSums, Trainer):
    """Records what decides the numbers of a run, compares it on a resume, and applies changes.

    Attributes:
        facts: what decides the numbers of this call of `train`; None until it is known.
        changes: what differs from the checkpoint that this call resumes from.
    """

    args: DPOConfig
    reference: RunReference
    facts: dict[str, Any] | None
    changes: Changes

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._has_optimizer = self.optimizer is not None
        self._has_schedule = self.lr_scheduler is not None
        self._fresh_groups: list[dict[str, Any]] = []
        self._reads_universal = False
        self.facts, self.changes = None, Changes()

    def note_facts(self, train_set: TrainingSet, num_steps: int) -> dict[str, Any]:
        """Find out what decides the numbers of this run; all ranks must call this together.

        Args:
            train_set: the training set.
            num_steps: optimizer steps of the whole run.

        Raises:
            ModelError, ConfigError, ReferenceStoreError: from `RunReference.settle`.
        """
        identity = self.reference.settle()
        is_own = self.reference.ref_model is None and not self.reference.is_gone
        config = self.user_args
        autocast = None
        if not self.is_deepspeed_enabled:
            autocast = AUTOCAST_DTYPES.get(self.accelerator.mixed_precision)
        facts = {
            **option_facts(config, num_steps),
            **given_facts(self, self._has_optimizer, self._has_schedule),
            **data_facts(train_set, is_first=config.process_index == 0),
            **model_facts(self.model, config, identity.description if is_own else None, autocast),
            **version_facts(),
        }
        # They are compared with facts that were written as JSON.
        plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
        self.facts = plain
        return plain

    def begin_afresh(self, train_set: TrainingSet, num_steps: int) -> None:
        """Note the facts of a run that doesn't resume; the arguments are those of `note_facts`."""
        self.note_facts(train_set, num_steps)
        self.changes = Changes()
        self.restore_sums(None, is_resumed=False)
        self.begin_betas(num_steps)
        if self.args.deepspeed_plugin is not None:
            load_universal(self.args.deepspeed_plugin.deepspeed_config, is_on=False)

    def check_same_run(
        self, recorded: RunState, checkpoint: str, train_set: TrainingSet, num_steps: int
    ) -> None:
        """Compare this run with the checkpoint that it resumes from, and go on with its sums.

        Args:
            recorded: what the checkpoint says.
            checkpoint: its folder.
            train_set: the training set.
            num_steps: optimizer steps of the whole run.

        Raises:
            CheckpointError: something differs that decides the numbers; names all of it.
            ConfigError: allow_changed has a name that it can't have.
        """
        allowed = read_allowed(self.args.allow_changed)
        facts = self.note_facts(train_set, num_steps)
        self.restore_sums(recorded.sums, is_resumed=True)
        if self.args.ignore_data_skip:  # the user asks for other data than the next ones
            allowed |= {"data", *LIMITS}
        self.changes, plugin = Changes(), self.args.deepspeed_plugin
        if recorded.facts is None:
            if self.args.should_log:
                logger.warning(
                    "%s doesn't record its data and options, as an early version wrote it; they "
                    "can't be compared with those of this run.",
                    checkpoint,
                )
            return
        converted = plugin is not None and is_converted(checkpoint)
        needs_conversion = plugin is not None and not converted
        other_ranks = recorded.facts.get("ranks") != facts["ranks"]
        self.changes = compare(
            recorded.facts,
            facts,
            allowed,
            checkpoint,
            self._conversion(checkpoint, recorded) if needs_conversion and other_ranks else None,
        )
        if plugin is not None:
            self._reads_universal = converted and other_ranks
            load_universal(plugin.deepspeed_config, self._reads_universal)
        if self.args.should_log:
            _say(self.changes, checkpoint)

    def _conversion(self, checkpoint: str, recorded: RunState) -> str:
        """How to convert the states of the optimizer for another number of ranks."""
        ranks = int((recorded.facts or {})["ranks"])
        files = list_files(Path(checkpoint))
        if missing_of_ranks(files, range(ranks), ranks, is_sharded=True):
            return (
                "copy the files of this checkpoint from all machines into one folder, as each has "
                f"only its own part here, and run there: {conversion(checkpoint)}"
            )
        return conversion(checkpoint)

    # What transformers loads from the checkpoint, though it isn't what the options say

    def _init_training_state(
        self,
        max_steps: int,
        steps_of_epoch: int,
        epochs: int,
        checkpoint: str | None,
        *args: Any,
        **options: Any,
    ) -> Any:
        given = (max_steps, steps_of_epoch, epochs, checkpoint)
        places = super()._init_training_state(*given, *args, **options)
        if checkpoint is not None:
            self._find_best(checkpoint)
        # Steps between logs, evaluations and saves are those of the options now.
        self.state.compute_steps(self.args, max_steps)
        self._restore_callbacks()
        return places

    def _find_best(self, checkpoint: str) -> None:
        """Take the best checkpoint from beside this one: the whole folder may have moved."""
        best = Path(checkpoint).parent / f"checkpoint-{self.state.best_global_step}"
        run_id = recorded_run_id(checkpoint)
        if run_id is not None and recorded_run_id(best) == run_id:
            if self.args.should_log and self.state.best_model_checkpoint != str(best):
                logger.info("The best checkpoint is %s.", best)
            self.state.best_model_checkpoint = str(best)
        # All ranks load it together at the end, each from the folder of its node.
        found = exchange(self.state.best_model_checkpoint)
        if None in found and any(found):
            if self.args.should_log:
                logger.warning(
                    "The best checkpoint isn't on the node of rank %d, so the run goes on without "
                    "one: copy it there and resume again to keep it.",
                    found.index(None),
                )
            self.state.best_model_checkpoint = None

    def _restore_callbacks(self) -> None:
        """Give the callbacks the counts that they had, such as the patience of early stopping."""
        recorded: Any = self.state.stateful_callbacks
        by_name: dict[str, list[Any]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                by_name.setdefault(type(callback).__name__, []).append(callback)
        for name, callbacks in by_name.items():
            found = recorded.setdefault(name, {})  # a save fails if the name is missing
            states = found if isinstance(found, list) else [found]
            # A save appends to a list, so the last entries are the newest ones.
            for callback, state in zip(callbacks, states[-len(callbacks) :], strict=False):
                if not isinstance(callback, TrainerControl):
                    for attribute, value in state.get("attributes", {}).items():
                        setattr(callback, attribute, value)

    def create_scheduler(self, *args: Any, **options: Any) -> Any:
        schedule = super().create_scheduler(*args, **options)
        self._fresh_groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        return schedule

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._apply_changes()

    def _apply_changes(self) -> None:
        """Give the loaded optimizer and schedule what the options say, as far as it may differ."""
        names = {change.name for change in self.changes.allowed}
        entries = {key for name in names for key in ENTRIES.get(name, ())}
        # DeepSpeed gives all groups the entries of the first one when it reads the universal form.
        if "optim_args" in names or self._reads_universal:
            entries |= _innermost(self.optimizer).defaults.keys() - {"lr"}
        for group, fresh in zip(self.optimizer.param_groups, self._fresh_groups, strict=True):
            group.update({key: fresh[key] for key in entries if key in fresh})
        if names & SCHEDULED or self._reads_universal:
            self._apply_schedule()
        if self.is_deepspeed_enabled:
            engine = self.model_wrapped
            if hasattr(engine.optimizer, "clip_grad"):
                engine.optimizer.clip_grad = float(self.args.max_grad_norm or 0.0)
            if self._reads_universal:
                own_steps(_innermost(self.optimizer))
                end_universal(engine)
                self._reads_universal = False

    def _apply_schedule(self) -> None:
        """Set the learning rate of the next step to what the options say."""
        schedule = self.lr_scheduler
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            return  # the user's own; the schedules that depend on more than the step are refused
        bases = [group["initial_lr"] for group in self._fresh_groups]
        schedule.base_lrs = bases
        rates = schedule._last_lr = [
            base * factor(schedule.last_epoch)
            for base, factor in zip(bases, schedule.lr_lambdas, strict=True)
        ]
        for group, base, rate in zip(self.optimizer.param_groups, bases, rates, strict=True):
            group["initial_lr"] = base
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _innermost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _say(changes: Changes, checkpoint: str) -> None:
    """Log what differs from a checkpoint, though the run goes on."""
    for change in changes.allowed:
        logger.info("Allowed to change: %s.", change)
    if changes.harmless:
        logger.info(
            "%s differs from this run in what changes its numbers by rounding only, or not at all: "
            "%s.",
            checkpoint,
            _listed(changes.harmless),
        )
    if changes.unknown:
        logger.info(
            "%s doesn't record %s, which can't be compared.", checkpoint, ", ".join(changes.unknown)
        )


def _listed(changes: tuple[Change, ...]) -> str:
    return "; ".join(str(change) for change in changes)
