"""The trainer's evaluation: exact means of the metrics over the held-out pairs of all ranks."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainerControl
from transformers.trainer_utils import EvalLoopOutput

from dpofast.data.packing.batch import PackedPairs
from dpofast.errors import ConfigError
from dpofast.model.forward import evaluating, micro_batch
from dpofast.monitor.metrics import MetricSums
from dpofast.options.config import DPOConfig
from dpofast.train.dataset import RunDataset, pairs_of
from dpofast.train.loaders import StepLoader
from dpofast.train.reports import ReportsRun
from dpofast.zero.blocks import runnable
from dpofast_kernels import PairLossOutput


class EvaluatesPairs(ReportsRun, Trainer):
    """Makes a transformers Trainer evaluate held-out pairs as DPOTrainer trains them."""

    args: DPOConfig
    control: TrainerControl
    eval_dataset: Any

    def compute_pair_loss(
        self, model: nn.Module, batch: PackedPairs, sums: MetricSums
    ) -> PairLossOutput:
        raise NotImplementedError

    def eval_sets(self) -> dict[str, RunDataset]:
        """The held-out datasets by name; a single one is called "eval"."""
        given = self.eval_dataset
        if given is None:
            return {}
        if not isinstance(given, dict):
            return {"eval": self.data.prepare(given, "eval")}
        return {key: self.data.prepare(pairs, f"eval_{key}") for key, pairs in given.items()}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> StepLoader:
        if eval_dataset is None:
            eval_dataset = self.eval_dataset
        elif isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        if eval_dataset is None:
            raise ConfigError("DPOTrainer: evaluate() needs an eval_dataset.")
        dataset = self.data.prepare(eval_dataset, "eval")
        self.loaders.settle()
        self.loaders.score(dataset)
        return self.loaders.evaluation(dataset)

    def get_test_dataloader(self, test_dataset: Any) -> StepLoader:
        return self.get_eval_dataloader(self.data.prepare(test_dataset, "test").pairs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute exact means of the metrics over the pairs of all ranks.

        A dict of datasets gives each of them metrics; a string names one of the trainer's sets.
        """
        if isinstance(eval_dataset, str):
            own = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if eval_dataset not in own:
                raise ConfigError(
                    f"evaluate: there is no set {eval_dataset!r} among the trainer's "
                    f"({', '.join(own) or 'none is named'}); pass a dataset, or one of these names."
                )
        elif eval_dataset is not None:
            eval_dataset = pairs_of(self.data.prepare_sets(eval_dataset, metric_key_prefix))
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: StepLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.callback_handler.eval_dataloader = dataloader
        sums = MetricSums()
        with runnable(self), evaluating(self.model):
            for step in dataloader:
                for batch in step.micro_batches:
                    with micro_batch(self.model, batch):
                        self.compute_pair_loss(self.model, batch, sums)
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        means = sums.means(self.sum_over_ranks, self.args.device)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics=metrics,
            num_samples=len(dataloader.dataset),  # type: ignore[arg-type]
        )
