"""The part of DPOTrainer that reads a checkpoint's files: without their code, and all weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from transformers import Trainer

from dpofast.model.parts import is_peft_model
from dpofast.options.config import DPOConfig
from dpofast.train.checkpoint.resume import check_best
from dpofast.train.exchange import done_on
from dpofast.train.resuming.renamed_weights import has_other_names, load_renamed
from dpofast.zero.unpickling import reading_checkpoint


class ReadsCheckpoints(Trainer):
    """Makes a transformers Trainer read checkpoints without running code that they hold.

    These are all the methods in which it calls `torch.load`, or lets DeepSpeed or peft do so.
    """

    args: DPOConfig

    def _reading(self, checkpoint: str) -> AbstractContextManager[None]:
        return reading_checkpoint(
            checkpoint, self.args.trust_checkpoint, bool(self.is_deepspeed_enabled)
        )

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        given = (max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is None:
            return super()._prepare_for_training(*given)
        with self._reading(resume_from_checkpoint):
            return super()._prepare_for_training(*given)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._reading(resume_from_checkpoint):
            if self._has_other_names(resume_from_checkpoint):
                load_renamed(self.model, resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with self._reading(checkpoint):
                super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.args.verify_checkpoint:
            done_on(self.args.should_save, lambda: check_best(best))
        with self._reading(best):
            if self._has_other_names(best):
                load_renamed(self.model, best)
            else:
                super()._load_best_model()

    def _has_other_names(self, checkpoint: str) -> bool:
        """Whether transformers would pass over some weights.

        DeepSpeed and peft read files of their own, by names of their own.
        """
        if self.is_deepspeed_enabled or is_peft_model(self.model):
            return False
        return has_other_names(self.model, checkpoint)
