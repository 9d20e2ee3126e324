"""What an evaluation predicts: log-probs and rewards of each pair, for `compute_metrics`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_utils import denumpify_detensorize

from dpofast.data.packing.batch import PackedPairs
from dpofast.errors import ConfigError
from dpofast.model.pair_losses import pair_losses
from dpofast.monitor.metrics import SumOverRanks
from dpofast.options.config import DPOConfig
from dpofast.train.own.metrics import SPEEDS
from dpofast.train.steps.coupled import NUM_COLUMNS, losses_of_table
from dpofast_kernels import PairLoss, PreferenceLoss, pair_metrics


class PairPredictions(NamedTuple):
    """Per-pair results of an evaluation, in the order of the dataset: arrays [n], all fp64.

    Attributes:
        chosen_logps: summed log-probs of the chosen answers under the policy, in nats.
        rejected_logps: the same of the rejected answers.
        ref_chosen_logps: summed log-probs of the chosen answers under the reference.
        ref_rejected_logps: the same of the rejected answers.
        chosen_rewards: beta times the chosen log-ratio.
        rejected_rewards: beta times the rejected log-ratio.
        chosen_lengths: scored tokens of the chosen answers.
        rejected_lengths: scored tokens of the rejected answers.
    """

    chosen_logps: np.ndarray
    rejected_logps: np.ndarray
    ref_chosen_logps: np.ndarray
    ref_rejected_logps: np.ndarray
    chosen_rewards: np.ndarray
    rejected_rewards: np.ndarray
    chosen_lengths: np.ndarray
    rejected_lengths: np.ndarray


class PredictedPairs:
    """Collects the log-probs of a dataset's pairs while its batches are evaluated.

    Args:
        num_pairs: n, pairs in the dataset.
        device: device to collect them on.
    """

    def __init__(self, num_pairs: int, device: torch.device) -> None:
        # logps, ref_logps and lengths of both answers, how often the pair was evaluated, and its
        # weight and confidence
        self._table = torch.zeros(num_pairs, 9, dtype=torch.float64, device=device)
        self._has_confidence = False

    def add(
        self,
        indices: list[int],
        logps: Any,
        batch: PackedPairs,
        pair_weights: Tensor | None = None,  # [P]
    ) -> None:
        """Add the pairs of a micro-batch.

        Args:
            indices: the pairs, counted in the dataset.
            logps: [P, 2] summed log-probs of chosen and rejected.
            batch: the micro-batch, with its reference log-probs.
            pair_weights: [P] fp64, WPO's weights of the pairs; None for 1.

        Raises:
            ConfigError: an overridden `prediction_step` returned no such log-probs.
        """
        assert batch.ref_logps is not None
        if not isinstance(logps, Tensor) or logps.shape != (batch.num_pairs, 2):
            raise ConfigError(
                "prediction_step: the log-probs of the pairs are missing, expected a tensor "
                f"[{batch.num_pairs}, 2] as the second result; return what "
                "super().prediction_step returns, and call super().compute_loss in compute_loss."
            )
        parts = (logps, batch.ref_logps.view(-1, 2), batch.lengths)
        row = torch.cat([part.detach().to(self._table) for part in parts], 1)  # [P, 6]
        ones = row.new_ones(len(row))
        weights, confidence = (
            ones if values is None else values.to(ones)
            for values in (batch.weights, batch.label_confidence)
        )
        if pair_weights is not None:
            weights = weights * pair_weights.to(ones)
        # All batches of a dataset have confidences, or none has.
        self._has_confidence = batch.label_confidence is not None
        # One rank has each pair, and all others have 0 there: the sum over ranks is the whole.
        self._table[indices] += torch.cat([row, torch.stack([ones, weights, confidence], 1)], 1)

    def gather(self, sum_over_ranks: SumOverRanks) -> None:
        """Bring the pairs of all ranks to every rank; all ranks must call this together.

        Raises:
            ConfigError: the loader didn't bring every pair of the dataset once.
        """
        self._table = sum_over_ranks(self._table).cpu()
        wrong = (self._table[:, NUM_COLUMNS] != 1).nonzero()
        if len(wrong):
            pair = int(wrong[0])
            times = int(self._table[pair, NUM_COLUMNS])
            raise ConfigError(
                f"get_eval_dataloader: pair {pair} was evaluated {times} times; "
                "compute_metrics, predict and a loss that couples pairs need a loader that brings "
                "every pair once, such as super().get_eval_dataloader(dataset)."
            )

    def predictions(self, beta: float) -> PairPredictions:
        """The collected values of all pairs, with their rewards."""
        logps, ref_logps, bounds = self._columns()
        metrics = pair_metrics(logps, ref_logps, bounds, beta)
        columns = [column.clone().numpy() for column in self._table.unbind(1)]
        rewards = [metrics[f"rewards/{side}"].numpy() for side in ("chosen", "rejected")]
        return PairPredictions(*columns[:4], *rewards, *columns[4:6])

    def losses(self, loss: PreferenceLoss, device: torch.device) -> np.ndarray:
        """[n] fp64: the loss of each pair, times its weight."""
        if not isinstance(loss, PairLoss):
            return losses_of_table(loss, self._table[:, :NUM_COLUMNS].to(device)).cpu().numpy()
        logps, ref_logps, bounds = (column.to(device) for column in self._columns())
        logratios = logps - ref_logps
        weights, confidence = self._table[:, 7].to(device), self._table[:, 8].to(device)
        with torch.no_grad():
            values, *_ = pair_losses(
                *(loss, logratios, bounds.diff().view(-1, 2), weights),
                confidence if self._has_confidence else None,
            )
        return values.cpu().numpy()

    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """logps [2n], ref_logps [2n] and bounds [2n+1]."""
        logps, ref_logps, lengths = (self._table[:, at : at + 2].flatten() for at in (0, 2, 4))
        bounds = torch.cat([lengths.new_zeros(1), lengths]).cumsum(0).long()
        return logps, ref_logps, bounds


def check_compute_metrics(config: DPOConfig, compute_metrics: Any) -> None:
    """Check that `compute_metrics` can be called as the options say.

    Raises:
        ConfigError: it isn't a function, or an option asks for what no evaluation has.
    """
    if compute_metrics is None:
        return
    if not callable(compute_metrics):
        raise ConfigError(f"compute_metrics: got {compute_metrics!r}, expected a function.")
    if config.batch_eval_metrics:
        raise ConfigError(
            "batch_eval_metrics isn't supported: compute_metrics gets all pairs at once; leave it "
            "out, or return values of single pairs from metrics_fn, whose means are taken."
        )
    if not config.eval_do_concat_batches:
        raise ConfigError(
            "eval_do_concat_batches: false isn't supported: compute_metrics gets all pairs at once "
            "in the order of the dataset; leave it out."
        )
    if "inputs" in config.include_for_metrics:
        raise ConfigError(
            "include_for_metrics: inputs aren't kept; compute_metrics gets the pairs in the order "
            "of the dataset, so look their rows up there."
        )


def own_evaluation_metrics(
    compute_metrics: Callable[[EvalPrediction], Any],
    prediction: EvalPrediction,
    taken: Collection[str],
    prefix: str,
) -> dict[str, Any]:
    """What a user's `compute_metrics` measures, under names with the prefix of the evaluation.

    Args:
        compute_metrics: the user's function.
        prediction: what it gets.
        taken: names of the metrics that the evaluation has already, with their prefix.
        prefix: prefix of the evaluation, such as "eval".

    Raises:
        ConfigError: the function returned no dict of names and what logs can hold, or a name that
            is taken.
    """
    found = compute_metrics(prediction)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConfigError(
            f"compute_metrics: it returned a {type(found).__name__}, expected a dict of names and "
            "numbers."
        )
    found = denumpify_detensorize(found)
    for name, value in found.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"compute_metrics: {name!r} is a {type(value).__name__}, which logs and "
                "checkpoints can't hold; return a number."
            ) from error
    named = {
        name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value
        for name, value in found.items()
    }
    if len(named) < len(found):
        raise ConfigError(
            f"compute_metrics: some of the names {', '.join(found)} are the same with the prefix "
            f"{prefix}_; choose others."
        )
    measured = {*taken, *(f"{prefix}_{name}" for name in SPEEDS)}
    clash = sorted(set(named) & measured)
    if clash:
        raise ConfigError(
            f"compute_metrics: the names {', '.join(clash)} are measured already; choose others."
        )
    return named
