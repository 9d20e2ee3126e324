"""KTOTrainer: TRL's name for training on single answers, each desirable or undesirable."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch

from dpofast.data.packing.batch import StepBatch
from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig
from dpofast.options.kto import KTOConfig
from dpofast.options.trl import refuse
from dpofast.train.data.answers import AnswerPreparer
from dpofast.train.data.dataset import PairPreparer
from dpofast.train.steps.answers import AnswerLossPass, mismatched_logratios, with_z
from dpofast.train.steps.micro_batches import PairLossPass
from dpofast.train.trainer import DPOTrainer

_REMEDY = "it takes pairs, and KTOTrainer has none; leave it out"


class KTOTrainer(DPOTrainer):
    """Kahneman-Tversky optimization (arXiv:2402.01306) and apo_zero_unpaired (arXiv:2408.06266).

    A DPOTrainer whose loss takes each answer by itself. The arguments are those of DPOTrainer.

    Args:
        args: a KTOConfig; or a DPOConfig with one of its losses.
        train_dataset: unpaired rows in any form that `load_unpaired` reads; pairs are split.
        eval_dataset: the same, or a dict of several named sets.
        loss_fn, metrics_fn, compute_metrics: must be None.

    Raises:
        ConfigError, DataError, ModelError, ReferenceStoreError: all ValueErrors, with the remedy.
    """

    preparer_class: ClassVar[type[PairPreparer]] = AnswerPreparer
    pass_class: ClassVar[type[PairLossPass]] = AnswerLossPass
    takes_answers: ClassVar[bool] = True
    config_class: ClassVar[type[DPOConfig]] = KTOConfig
    accepted_class: ClassVar[type[DPOConfig] | None] = DPOConfig
    pair_loss: Any  # an UnpairedLoss

    def __init__(self, *args: Any, **options: Any) -> None:
        for name in ("loss_fn", "metrics_fn", "compute_metrics"):
            refuse(name, options.get(name), _REMEDY)
        super().__init__(*args, **options)
        refuse("compute_metrics", self.compute_metrics, _REMEDY)  # from its place in the arguments

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """As DPOTrainer; z is that of each step of the evaluation.

        Raises:
            ConfigError: compute_metrics was set after the trainer was made.
        """
        refuse("compute_metrics", self.compute_metrics, _REMEDY)
        return super().evaluate(*args, **options)

    def _evaluate_step(self, step: Any, *args: Any) -> None:
        super()._evaluate_step(self.prepared_step(step), *args)

    def prepared_step(self, step: StepBatch) -> StepBatch:
        """The step with its z, the same on all ranks, which call this together."""
        if not self.pair_loss.takes_z:
            return step
        own = mismatched_logratios(
            *(self.model, step.micro_batches, self.accelerator.autocast, self.args.device),
            self._pair_loss_pass.head_backend,
        )
        nothing = torch.zeros(1, dtype=torch.float64, device=self.args.device)
        total = self.sum_over_ranks(sum((each.sum() for each in own), nothing))
        return with_z(step, own, total[0])

    def predict(self, *args: Any, **options: Any) -> NoReturn:
        """Not supported: predictions are those of pairs.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"predict: predictions are those of pairs, and {self.pair_loss.name} has none; call "
            "evaluate()."
        )
