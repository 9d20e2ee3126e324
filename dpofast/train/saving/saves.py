"""What the trainer saves: models, and what a checkpoint holds beside transformers' files."""

from __future__ import annotations

import logging
import os
import uuid
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from dpofast.errors import ModelError
from dpofast.options.config import DPOConfig
from dpofast.ranks.member import own_node
from dpofast.train.checkpoint.reports import RankReports
from dpofast.train.checkpoint.resume import TRAINER_STATE_FILE, why_not_whole
from dpofast.train.checkpoint.rotate import rotate
from dpofast.train.checkpoint.run_id import take_over
from dpofast.train.checkpoint.space import exporting
from dpofast.train.data.stream import RunStream
from dpofast.train.reference.run_reference import RunReference
from dpofast.train.reports.cards import WritesCards
from dpofast.train.resuming.continues_run import ContinuesRun
from dpofast.train.resuming.room import SaveSize
from dpofast.train.saving.checks import check_saved
from dpofast.train.saving.each_node import saved_by_this_rank, write_latest
from dpofast.train.saving.staged_save import RankFiles, StagedSave

logger = logging.getLogger(__name__)


class SavesRun(WritesCards, ContinuesRun, Trainer):
    """Makes a transformers Trainer check what it saves, and save checkpoints that are whole.

    Attributes:
        run_id: what the run is known by in the manifests of its checkpoints; None before its first
            save.
    """

    args: DPOConfig
    reference: RunReference
    run_id: str | None = None
    save_size: SaveSize | None
    _staged: StagedSave | None = None  # only while a checkpoint is being written

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as transformers' Trainer does, with a card; check the names of the saved tensors.

        Raises:
            ModelError: the disk is full or can't be written; or from_pretrained couldn't load what
                was saved, and the files stay.
        """
        folder = output_dir or str(self.args.output_dir)
        size = None if self.save_size is None else self.save_size.model
        with (
            nullcontext() if _internal_call else exporting(folder, size),
            self.own_card(folder) if self.args.should_save else nullcontext(),
            saved_by_this_rank(self.model) if self._leads_another_node() else nullcontext(),
        ):
            super().save_model(output_dir, _internal_call)
        if not self.args.should_save or not self._has_weights():
            return
        try:
            check_saved(folder, self.model)
        except ModelError as error:
            if not _internal_call:
                raise
            # In a checkpoint, whose folder has no name yet; the optimizer is still to be saved.
            logger.error("%s", str(error).replace(folder, self._final_name(folder)))

    def _leads_another_node(self) -> bool:
        """Whether this rank saves for a node without rank 0."""
        return self.args.should_save and not self.is_world_process_zero()

    def _has_weights(self) -> bool:
        """Whether this rank gets all weights to save them; under ZeRO-3, only rank 0 does."""
        plugin = self.args.deepspeed_plugin
        return self.is_world_process_zero() or plugin is None or plugin.zero_stage < 3

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # What transformers and peft write without the weights looks like a model and isn't one.
        if self._has_weights() or not self.args.should_save:
            super()._save(output_dir, state_dict)

    def _final_name(self, folder: str) -> str:
        return folder if self._staged is None else str(self._staged.final)

    def stream_state(self) -> dict[str, Any] | None:
        """Where the next step begins in the stream of training pairs; None for other datasets."""
        train_set = self.data.known(self.train_dataset, RunStream)
        return None if train_set is None else train_set.recorded()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.count_tokens()
        run_dir = self._get_output_dir(trial)
        save = StagedSave(
            Path(run_dir),
            self.state.global_step,
            self.args.should_save,
            RankReports.of_process_group(self.args.ddp_timeout),
            own_node(),
            needed=None if self.save_size is None else self.save_size.likely,
        )
        with save.failing_together():
            run_id = save.begin(self.run_id or uuid.uuid4().hex)
            self._staged = save
            try:
                self._write_checkpoint(model, trial)
            finally:
                self._staged = None
            self._name_best(run_dir, save.folder)
            zero = getattr(self.model_wrapped, "zero_optimization", None)
            expected = RankFiles(
                are_expected=not self.args.save_only_model,
                is_sharded=self.is_deepspeed_enabled and zero is not None and bool(zero()),
            )
            folder = save.finish(expected)
            if self.args.should_save:
                take_over(run_dir, run_id)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run_dir, run_id, self._most_checkpoints(), [folder, best])

    def _most_checkpoints(self) -> int | None:
        """The user's save_total_limit, which `LoopArguments` hides."""
        limit: int | None = vars(self.args)["save_total_limit"]
        return limit

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers' Trainer does; a save_total_limit of 1 leaves the best at the end.

        The last checkpoint stays as well if the best one is damaged.
        """
        output = super().train(*args, **kwargs)
        best = self.state.best_model_checkpoint
        if self.args.should_save and self._most_checkpoints() == 1 and best and self.run_id:
            reason = why_not_whole(best)
            if reason is None:
                rotate(Path(best).parent, self.run_id, 1, [best], keep_newest=False)
            else:
                logger.warning("The best checkpoint is not whole: %s: %s.", best, reason)
        return output

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the files of this rank's part of a checkpoint into its temporary folder."""
        assert self._staged is not None
        sums = self.sums_of_ranks()
        if self.args.should_save:
            kept = self.args.precompute_ref_log_probs
            state = self.reference.run_state(kept, self.loaders.row_tokens)
            state = replace(state, stream=self.stream_state(), facts=self.facts, sums=sums)
            layers = self.recomputation.layers
            state = replace(state, beta=self.recorded_beta(), recomputed_layers=layers)
            state.save(self._staged.folder)
            self.write_card(self.args.output_dir)  # which hub_strategy may upload at once
        super()._save_checkpoint(model, trial)
        if (
            self._leads_another_node()
            and self.is_deepspeed_enabled
            and not self.args.save_only_model
        ):
            write_latest(self._staged.folder)

    def _name_best(self, run_dir: str, staged: Path) -> None:
        """Record the best checkpoint under its final name, which transformers hasn't seen."""
        best_step = self.state.best_global_step
        best = os.path.join(run_dir, f"checkpoint-{best_step}")
        if best_step and (best_step == self.state.global_step or os.path.isdir(best)):
            self.state.best_model_checkpoint = best
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_FILE))

    def _get_output_dir(self, trial: Any) -> str:
        # transformers writes the files of a save into the `checkpoint-N` of this folder, and
        # applies save_total_limit to it.
        folder: str = super()._get_output_dir(trial)
        return folder if self._staged is None else str(self._staged.area)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staged is None:  # it is pushed once it is whole
            super()._push_from_checkpoint(checkpoint_folder)
