"""The part of DPOTrainer that resumes a run from a checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from dpofast.options.config import DPOConfig
from dpofast.train.checkpoint.resume import refuse_finished, resolve_checkpoint
from dpofast.train.checkpoint.run_state import load_run_state
from dpofast.train.continues_run import ContinuesRun
from dpofast.train.loaders import StepLoaders
from dpofast.train.reference import RunReference
from dpofast.train.training_set import TrainingSet


class ResumesRun(ContinuesRun, Trainer):
    """Makes a transformers Trainer choose and check the checkpoint that a run resumes from."""

    args: DPOConfig
    reference: RunReference
    loaders: StepLoaders

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
        checkpoint = resolve_checkpoint(given, self.args.output_dir)
        if checkpoint is None:
            return None, 0
        refuse_finished(checkpoint, num_steps)
        recorded = load_run_state(checkpoint)
        self.check_same_run(recorded, checkpoint, train_set, num_steps)
        self.reference.restore(recorded, checkpoint)
        self.loaders.settle(recorded.row_tokens)
        return checkpoint, train_set.resume(recorded.stream)
