"""What the trainer saves: models, and what a checkpoint holds beside transformers' files."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from dpofast.errors import ModelError
from dpofast.options.config import DPOConfig
from dpofast.train.cards import WritesCards
from dpofast.train.continues_run import ContinuesRun
from dpofast.train.reference import RunReference
from dpofast.train.saving import check_saved
from dpofast.train.stream import RunStream

logger = logging.getLogger(__name__)


class SavesRun(WritesCards, ContinuesRun, Trainer):
    """Makes a transformers Trainer check what it saves, and record the run in its checkpoints."""

    args: DPOConfig
    reference: RunReference

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as transformers' Trainer does, with a card; check the names of the saved tensors.

        Raises:
            ModelError: from_pretrained couldn't load what was saved. The files stay.
        """
        folder = output_dir or str(self.args.output_dir)
        with self.own_card(folder) if self.args.should_save else nullcontext():
            super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        try:
            check_saved(folder, self.model)
        except ModelError as error:
            if not _internal_call:
                raise
            logger.error("%s", error)  # in a checkpoint; the optimizer is still to be saved

    def stream_state(self) -> dict[str, Any] | None:
        """Where the next step begins in the stream of training pairs; None for other datasets."""
        train_set = self.data.known(self.train_dataset, RunStream)
        return None if train_set is None else train_set.recorded()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.count_tokens()
        sums = self.sums_of_ranks()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            kept = self.args.precompute_ref_log_probs
            state = self.reference.run_state(kept, self.loaders.row_tokens)
            state = replace(state, stream=self.stream_state(), facts=self.facts, sums=sums)
            state.save(folder)
            self.write_card(self.args.output_dir)  # which hub_strategy may upload at once
        super()._save_checkpoint(model, trial)
