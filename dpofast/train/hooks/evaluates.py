"""The trainer's evaluation: exact means of the metrics over the held-out pairs of all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainerControl
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from dpofast.data.packing.batch import StepBatch
from dpofast.data.packing.pair_columns import set_names
from dpofast.errors import ConfigError
from dpofast.model.forward import evaluating
from dpofast.monitor.metrics import MetricSums
from dpofast.options.config import DPOConfig
from dpofast.train.data.dataset import RunDataset, pairs_of
from dpofast.train.finite.evaluation import (
    ChoosesFiniteBest,
    EvaluatedLosses,
    check_evaluation,
)
from dpofast.train.hooks.computes_loss import ComputesLoss
from dpofast.train.hooks.overrides import check_overrides, override_of
from dpofast.train.hooks.predictions import (
    PairPredictions,
    PredictedPairs,
    check_compute_metrics,
    own_evaluation_metrics,
)
from dpofast.train.steps.loaders import StepLoader
from dpofast.zero.blocks import runnable


class EvaluatesPairs(ChoosesFiniteBest, ComputesLoss, Trainer):
    """Makes a transformers Trainer evaluate held-out pairs as DPOTrainer trains them."""

    args: DPOConfig
    control: TrainerControl
    eval_dataset: Any

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
        check_overrides(self)  # some may have been assigned since the trainer was made
        check_compute_metrics(self.user_args, self.compute_metrics)
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

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Compute metrics as `evaluate` does, and return the log-probs of every pair, too.

        Returns:
            A PredictionOutput whose predictions are PairPredictions, in the dataset's order.
        """
        check_overrides(self)
        check_compute_metrics(self.user_args, self.compute_metrics)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: StepLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.callback_handler.eval_dataloader = dataloader
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        num_pairs = len(dataloader.dataset)  # type: ignore[arg-type]
        dataset = getattr(dataloader, "run_dataset", None)
        # A loss that couples pairs is known at the end. An override, which may do anything with
        # it, needs it before, and so do the metrics of each dataset in a mixture.
        is_mixture = dataset is None or bool(set_names(dataset.pairs))
        is_early = self.couples_pairs and (is_mixture or bool(self._loss_overrides()))
        is_late = self.couples_pairs and not is_early
        is_collected = is_late or not prediction_loss_only
        found = PredictedPairs(num_pairs, self.args.device) if is_collected else None
        sums, losses = MetricSums(), EvaluatedLosses()
        with runnable(self), evaluating(self.model):
            known = self._coupled_losses(dataloader) if is_early else None
            for step in dataloader:
                self._expect(step, known)
                self._evaluate_step(step, sums, found, losses, ignore_keys)
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        self.uncouple()
        means = self._pair_loss_pass.finish(sums.means(self.sum_over_ranks, self.args.device))
        if found is not None:
            found.gather(self.sum_over_ranks)
            if is_late and "loss" in means:
                means["loss"] += float(found.losses(self.pair_loss, self.args.device).mean())
        check_evaluation(self.model, losses, dataset, means)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        predictions = None
        if found is not None and not prediction_loss_only:
            predictions = found.predictions(self.pair_loss)
            metrics |= self._own_metrics(found, predictions, metrics, metric_key_prefix)
        return EvalLoopOutput(
            predictions=predictions,
            label_ids=None,
            metrics=metrics,
            num_samples=num_pairs,
        )

    def _evaluate_step(
        self,
        step: Any,
        sums: MetricSums,
        found: PredictedPairs | None,
        losses: EvaluatedLosses,
        ignore_keys: list[str] | None,
    ) -> None:
        """Count the metrics of a step's pairs, and collect what is predicted of them."""
        for index, batch in enumerate(step.micro_batches):
            with self.opened(batch):
                loss, logps, _ = self.prediction_step(
                    self.model, batch, found is None, ignore_keys=ignore_keys
                )
                self.count(sums, loss, batch, "compute_loss", "prediction_step")
                output = self._computed.output
                logps_found = None if output is None else output.logps
                losses.add(step.indices[index], batch, loss, logps_found)
            if found is not None:
                pair_weights = None if output is None else output.pair_weights
                found.add(step.indices[index], logps, batch, pair_weights)

    def _expect(self, step: Any, losses: Tensor | None) -> None:
        """Look at an item of the loader, and note the losses [n] of a loss that couples pairs."""
        if not isinstance(step, StepBatch):
            raise ConfigError(
                f"get_eval_dataloader: an item of the loader is a {type(step).__name__}, but "
                "evaluation runs whole steps; return what super().get_eval_dataloader returns."
            )
        self.couple_evaluated(step, losses)

    def _loss_overrides(self) -> list[str]:
        """Where methods are overridden that may change the loss of an evaluation."""
        hooks = ("compute_loss", "prediction_step", "compute_pair_loss")
        return [where for hook in hooks if (where := override_of(self, hook))]

    def _coupled_losses(self, dataloader: StepLoader) -> Tensor:
        """[n]: the losses of all pairs together, for which each is run once."""
        device = self.args.device
        pairs = PredictedPairs(len(dataloader.dataset), device)  # type: ignore[arg-type]
        for step in dataloader:
            self._expect(step, None)
            for indices, batch in zip(step.indices, step.micro_batches, strict=True):
                with self.compute_loss_context_manager():
                    table = self.coupled_pass().table(batch)
                pairs.add(indices, table[:, :2], batch)
        pairs.gather(self.sum_over_ranks)
        return torch.from_numpy(pairs.losses(self.pair_loss, device)).to(device)

    def _own_metrics(
        self,
        found: PredictedPairs,
        predictions: PairPredictions,
        metrics: dict[str, float],
        prefix: str,
    ) -> dict[str, Any]:
        """What the user's `compute_metrics` measures."""
        if self.compute_metrics is None:
            return {}
        losses: np.ndarray | None = None
        if "loss" in self.args.include_for_metrics:
            losses = found.losses(self.pair_loss, torch.device(self.args.device))
        # There are no labels: a pair says itself which answer is the better one.
        prediction = EvalPrediction(predictions, None, losses=losses)
        return own_evaluation_metrics(self.compute_metrics, prediction, metrics, prefix)
