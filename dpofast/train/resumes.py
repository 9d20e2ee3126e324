"""The part of DPOTrainer that resumes a run from a checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from dpofast.options.config import DPOConfig
from dpofast.ranks.shared import check_on_all_nodes
from dpofast.train.checkpoint.resume import recorded_run_id, refuse_finished, resolve_checkpoint
from dpofast.train.checkpoint.run_state import load_run_state
from dpofast.train.checkpoint.staging import recover
from dpofast.train.exchange import exchange
from dpofast.train.loaders import StepLoaders
from dpofast.train.reference import RunReference
from dpofast.train.training_set import TrainingSet


class ResumesRun(Trainer):
    """Makes a transformers Trainer choose and check the checkpoint that a run resumes from."""

    args: DPOConfig
    reference: RunReference
    loaders: StepLoaders
    run_id: str | None

    def resume(self, given: Any, train_set: TrainingSet, num_steps: int) -> tuple[str | None, int]:
        """Restore what isn't in transformers' files: reference, length of rows, place in a stream.

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
        if self.args.should_save:
            recover(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        checkpoint = resolve_checkpoint(
            given, self.args.output_dir, verify=self.args.verify_checkpoint
        )
        if checkpoint is None:
            return None, 0
        check_on_all_nodes(checkpoint, exchange)
        refuse_finished(checkpoint, num_steps)
        self.run_id = recorded_run_id(checkpoint)
        recorded = load_run_state(checkpoint)
        self.reference.restore(recorded, checkpoint)
        self.loaders.settle(recorded.row_tokens)
        return checkpoint, train_set.resume(recorded.stream)
