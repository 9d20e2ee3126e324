"""The part of DPOTrainer that takes an output folder, and resumes a run from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from dpofast.errors import CheckpointError, ConfigError
from dpofast.monitor.callbacks import METRICS_FILE, MetricsFile
from dpofast.monitor.plots import PLOT_FILE
from dpofast.monitor.summary import SUMMARY_FILE
from dpofast.options.config import DPOConfig
from dpofast.options.output_dir import make_output_dir
from dpofast.ranks.shared import check_on_all_nodes
from dpofast.reference.identity.description import no_reference
from dpofast.train.checkpoint.lock import locked
from dpofast.train.checkpoint.nodes import (
    check_files_of_ranks,
    check_on_each_node,
    whole_on_all_nodes,
)
from dpofast.train.checkpoint.resume import saved_step, step_folders
from dpofast.train.checkpoint.run_state import load_run_state
from dpofast.train.checkpoint.staging import recover
from dpofast.train.checkpoint.start import (
    AUTO,
    Folder,
    Start,
    choose_start,
    on_this_node,
    owner_of,
    resume_point,
    settle_start,
)
from dpofast.train.data.training_set import TrainingSet
from dpofast.train.exchange import decided_by_rank_0, done_on, exchange, ranks_of_this_node
from dpofast.train.reference.run_reference import RunReference
from dpofast.train.resuming.continues_run import ContinuesRun
from dpofast.train.resuming.room import SaveSize, check_room, save_size
from dpofast.train.steps.loaders import StepLoaders
from dpofast.train.steps.recompute import Recomputation

REPORTS = (METRICS_FILE, SUMMARY_FILE, PLOT_FILE)
# Methods by which a subclass makes an optimizer of its own.
MAKERS = ("create_optimizer", "get_optimizer_cls_and_kwargs")

logger = logging.getLogger(__name__)


class ResumesRun(ContinuesRun, Trainer):
    """Makes a transformers Trainer choose and check the checkpoint that a run resumes from.

    Attributes:
        run_id: id of the run, the same on all ranks; None until `train` has begun.
        resumed_at_end: whether this call of `train` goes on from the run's last step, so that
            there is nothing left to train.
        exports_model: whether the model is sure to be saved after `train`; set by commands.
        save_size: what a save of the run takes; None until `train` has begun.
    """

    args: DPOConfig
    reference: RunReference
    loaders: StepLoaders
    recomputation: Recomputation
    run_id: str | None = None
    resumed_at_end: bool = False
    exports_model: bool = False
    save_size: SaveSize | None = None
    _has_output_dir: bool = False

    @contextmanager
    def alone_in_output_dir(self) -> Iterator[None]:
        """Keep other runs out of the output folder inside the `with` block, which can be nested.

        Raises:
            CheckpointError: on all ranks, if another process writes there.
        """
        if self._has_output_dir:
            yield
            return
        with ExitStack() as stack:
            done_on(self.args.should_save, lambda: self._lock(stack))
            self._has_output_dir = True
            try:
                yield
            finally:
                self._has_output_dir = False

    def _lock(self, stack: ExitStack) -> None:
        make_output_dir(self.args.output_dir)
        stack.enter_context(locked(self.args.output_dir))

    def resume(self, given: Any, train_set: TrainingSet, num_steps: int) -> tuple[str | None, int]:
        """Choose where the run begins, and restore what isn't in transformers' files.

        These are the reference, the length of rows, the layers that recompute, and the place in a
        stream. On several ranks, rank 0 chooses for all.

        Args:
            given: what `train` was given as resume_from_checkpoint.
            train_set: the training pairs.
            num_steps: optimizer steps of the whole run.

        Returns:
            The folder of the checkpoint, None for a fresh run, and the step to go on from in the
            plan of `train_set`.

        Raises:
            CheckpointError, ConfigError, ReferenceStoreError: it can't be resumed from.
        """
        self._say_if_ignored(given)
        if self.args.should_save:  # one rank, or one on each node
            self._tidy_up()
        self.accelerator.wait_for_everyone()
        folder = self._folder(given)
        start, self.save_size = decided_by_rank_0(lambda: self._choose_start(given, folder))
        done_on(self.args.should_save, lambda: self._check_folder(start, folder, num_steps))
        self.run_id, self.resumed_at_end = start.run.run, False
        if start.checkpoint is None:
            done_on(self.args.should_save, lambda: self._settle(start, folder))
            return None, 0
        checkpoint = str(start.checkpoint)
        check_on_all_nodes(checkpoint, exchange)
        is_verified = folder.on_all_nodes is not None
        if self.args.save_on_each_node and self.args.verify_checkpoint and not is_verified:
            check_on_each_node(checkpoint, self.args.should_save, exchange)
        step = saved_step(checkpoint)
        if step is not None and step > num_steps:
            raise ConfigError(
                f"resume_from_checkpoint: {checkpoint!r} stands at step {step}, beyond the "
                f"{num_steps} of this run; raise num_train_epochs or max_steps, or name an earlier "
                "checkpoint."
            )
        recorded = load_run_state(checkpoint)
        self.check_same_run(recorded, checkpoint, train_set, num_steps)
        self._check_files(checkpoint)
        if recorded.reference_digest == no_reference().digest and not self.reference.is_none:
            raise CheckpointError(
                f"{checkpoint!r} was trained without a reference, so a run with one can't go on "
                "from it: give the checkpoint as model_name_or_path, which starts a new run from "
                "its weights."
            )
        self.reference.restore(recorded, checkpoint)
        self.begin_betas(num_steps, recorded.beta)
        self.loaders.settle(recorded.row_tokens)
        self.recomputation.settle(self.loaders.row_tokens, recorded.recomputed_layers)
        done_on(self.args.should_save, lambda: self._settle(start, folder))
        self.resumed_at_end = step == num_steps
        if self.resumed_at_end:
            logger.info("%s is the run's last step: there is nothing left to train.", checkpoint)
            return checkpoint, 0
        return checkpoint, train_set.resume(recorded.stream)

    def _tidy_up(self) -> None:
        """Finish or undo what an interrupted save has left in the output folder."""
        try:
            recover(self.args.output_dir)
        except OSError as error:
            raise CheckpointError(
                f"output_dir: what an interrupted save has left at {error.filename!r} can't be "
                f"tidied up: {error.strerror}; delete it, or name another folder."
            ) from error

    def _choose_start(self, given: Any, folder: Folder) -> tuple[Start, SaveSize]:
        """Choose where the run begins, and compute the size of its saves; on rank 0."""
        makes_own = any(getattr(type(self), name) is not getattr(Trainer, name) for name in MAKERS)
        is_own = self.optimizer is not None or makes_own
        size = save_size(self.model, self.args, has_own_optimizer=is_own)
        return choose_start(given, folder), size

    def _check_folder(self, start: Start, folder: Folder, num_steps: int) -> None:
        """Check that an output folder is free, and the run's saves fit; on one rank of it."""
        assert self.save_size is not None
        start = on_this_node(start, folder)
        have = 0 if start.is_new else len(step_folders(folder.path))
        is_done = start.checkpoint is not None and saved_step(start.checkpoint) == num_steps
        steps, exports = 0 if is_done else num_steps, self.exports_model
        check_room(folder.path, self.save_size, self.args, steps, have=have, exports=exports)

    def _check_files(self, checkpoint: str) -> None:
        """Check that the files of all ranks are there, of which each node may have its own."""
        config, plugin = self.args, self.args.deepspeed_plugin
        ranks = ranks_of_this_node() if config.save_on_each_node else range(config.world_size)
        is_sharded = plugin is not None and plugin.zero_stage > 0
        done_on(
            config.should_save,
            lambda: check_files_of_ranks(checkpoint, ranks, config.world_size, is_sharded),
        )

    def _settle(self, start: Start, folder: Folder) -> None:
        """Make the output folder ready; on one rank, or on one of each node."""
        settle_start(on_this_node(start, folder), folder, REPORTS)
        if start.is_new:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, MetricsFile):
                    callback.begin_new_run(folder.path)

    def _folder(self, given: Any) -> Folder:
        """The output folder, as all nodes have it; on all ranks."""
        config, on_all_nodes = self.args, None
        path = Path(config.output_dir)
        looks_for_newest = resume_point(given) in (True, AUTO)
        if config.save_on_each_node and config.world_size > 1 and looks_for_newest:
            owner = decided_by_rank_0(lambda: owner_of(path))
            on_all_nodes = whole_on_all_nodes(
                path,
                None if owner is None else owner.run,
                config.verify_checkpoint,
                config.should_save,
                exchange,
            )
        return Folder(
            path,
            saves=config.save_strategy != SaveStrategy.NO,
            overwrite=config.overwrite_output_dir,
            verify=config.verify_checkpoint,
            on_all_nodes=on_all_nodes,
        )

    def _say_if_ignored(self, given: Any) -> None:
        option = self.args.resume_from_checkpoint
        if resume_point(option) is not None and given is None and self.args.process_index == 0:
            logger.warning(
                "resume_from_checkpoint=%r has no effect on its own: call train("
                "resume_from_checkpoint=args.resume_from_checkpoint).",
                option,
            )
