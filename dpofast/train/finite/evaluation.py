"""Says that an evaluation's loss isn't finite, and where that comes from."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from dpofast.data.packing.batch import PackedPairs
from dpofast.errors import NonFiniteError
from dpofast.model.finite import non_finite_names
from dpofast.options.config import DPOConfig
from dpofast.train.exchange import exchange
from dpofast.train.finite.non_finite import (
    bad_logps,
    distinct,
    have,
    names_in_words,
    rows_in_words,
    z_of,
)

logger = logging.getLogger(__name__)


class EvaluatedLosses:
    """The losses of an evaluation's micro-batches on this rank, which stay on their device."""

    def __init__(self) -> None:
        # The pairs of each micro-batch, their mean loss, which of them are bad, and their z.
        self._found: list[tuple[list[int], Tensor, Tensor | None, Tensor | None]] = []

    def add(self, indices: list[int], batch: PackedPairs, loss: Any, logps: Tensor | None) -> None:
        """Note a micro-batch.

        Args:
            indices: its pairs, counted in the dataset.
            batch: the micro-batch.
            loss: their mean loss; None if an override gives none.
            logps: [2P], the log-probs of their answers; None if they aren't known.
        """
        if isinstance(loss, Tensor) and indices:
            bad = None if logps is None else bad_logps(batch, logps.detach())
            self._found.append((indices, loss.detach(), bad, z_of(batch)))

    def bad_pairs(self) -> list[int]:
        """The pairs whose log-probs aren't finite; all of a micro-batch if none can be told."""
        pairs: list[int] = []
        for indices, loss, bad, z in self._found:
            flags = [False] if bad is None else bad.tolist()
            if not any(flags):
                # Pairs that can't be told apart, unless they only share the z of others.
                is_bad = not bool(loss.isfinite().all()) and (z is None or bool(z.isfinite()))
                flags = [is_bad] * len(indices)
            pairs += [index for index, is_bad in zip(indices, flags, strict=True) if is_bad]
        return pairs


def check_evaluation(
    model: nn.Module, losses: EvaluatedLosses, dataset: Any, metrics: Mapping[str, float]
) -> None:
    """Look at the metrics of an evaluation. All ranks must call this with the same metrics.

    Args:
        model: the evaluated model.
        losses: the losses of this rank.
        dataset: the evaluated RunDataset; None if it isn't known.
        metrics: means over the pairs by name.

    Raises:
        NonFiniteError: the loss isn't finite as weights of the model aren't. If only some pairs
            have such a loss, that is a warning.
    """
    if math.isfinite(metrics.get("loss", 0.0)):
        return
    pairs = losses.bad_pairs()
    rows = pairs if dataset is None or not pairs else dataset.pairs[pairs]["row"]
    found = exchange((rows, non_finite_names(model.named_parameters())))
    where = rows_in_words(sorted(row for rows, _ in found for row in rows))
    name = "the evaluated data" if dataset is None else dataset.name
    what = f"The loss of {name} is {metrics['loss']}"
    if weights := distinct(names for _, names in found):
        raise NonFiniteError(
            f"{what}, as {names_in_words(weights)} {have(weights)} NaN or infinite elements: go on "
            "from an earlier checkpoint, with a lower learning_rate if this run has trained them."
        )
    logger.warning(
        "%s, which comes from %s (counted from 0). The weights are finite, so look at these rows "
        "and at what computes their loss; float16 overflows where bfloat16 doesn't.",
        what, where,
    )  # fmt: skip


class ChoosesFiniteBest(Trainer):
    """Keeps a transformers Trainer from taking a metric that isn't finite for the best one."""

    args: DPOConfig

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = self.args.metric_for_best_model
        if name is not None:
            name = name if name.startswith("eval_") else f"eval_{name}"
            value = metrics.get(name, 0.0)
            if not torch.as_tensor(value, dtype=torch.float64).isfinite():
                logger.warning(
                    "%s is %s after step %d, which is never the best.",
                    name, value, self.state.global_step,
                )  # fmt: skip
                return False
        found: bool = super()._determine_best_metric(metrics, trial)
        return found
