"""The policy's pass over a micro-batch of scored pairs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from dpofast.data.packing.batch import PackedPairs
from dpofast.data.packing.likelihood import NO_LIKELIHOOD, Likelihood
from dpofast.errors import ConfigError
from dpofast.model.forward import run_batch
from dpofast.model.head import PairLossTask, head_options
from dpofast.model.pair_losses import batch_losses
from dpofast.model.parts import causal_lm
from dpofast.model.router import METRIC as ROUTER
from dpofast.model.router import RouterLoss, add_router_loss
from dpofast.monitor.kl import DRIFT, KL, kl_sums
from dpofast.monitor.metrics import MetricSums
from dpofast.monitor.set_metrics import set_metrics
from dpofast.train.own.metrics import MEASURED, NLL, OwnMetrics
from dpofast.train.steps.coupled import CoupledPairs, same_dropout
from dpofast.train.steps.token_metrics import statistics_of, token_metric_sums
from dpofast_kernels import (
    METRIC_NAMES,
    HeadOptions,
    PairExtras,
    PairLoss,
    PairLossOutput,
    PairWeighting,
    PreferenceLoss,
)


@dataclass(frozen=True, eq=False)
class PairLossPass:
    """Computes the loss of micro-batches, and counts their metrics.

    Attributes:
        model: the policy, not wrapped by DDP or DeepSpeed.
        router_loss: auxiliary loss of a mixture of experts' routers; None to train without it.
        autocast: makes the context of a forward pass.
        device: device of the policy.
        own_metrics: the user's metrics, if there are any.
        likelihood: likelihood terms of the loss.
        weighting: WPO's weights of the pairs, if they have any.
        token_metrics: names of the metrics that are means over tokens.
        head_backend: the head's back end, as in HeadOptions.
        upstream: factor of each pair's loss in the loss of the step, if there is a step.
    """

    model: nn.Module
    router_loss: RouterLoss | None
    autocast: Any
    device: torch.device
    own_metrics: OwnMetrics | None = None
    likelihood: Likelihood = NO_LIKELIHOOD
    weighting: PairWeighting | None = None
    token_metrics: tuple[str, ...] = ()
    head_backend: str = "auto"
    upstream: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics that every pass counts, and what `finish` adds to their means."""
        return MEASURED

    def names_with(self, loss: PreferenceLoss) -> list[str]:
        """All metrics that the passes count with this loss, without those of each dataset."""
        own = () if self.own_metrics is None else self.own_metrics.names
        names = [*self.names, *self.token_metrics, *own]
        names += [ROUTER] if self.router_loss is not None else []
        names += [NLL] if self.likelihood else []
        without = (KL, DRIFT) if loss.is_reference_free else ()
        return [name for name in names if name not in without]

    def finish(self, means: dict[str, float]) -> dict[str, float]:
        """The means of the metrics, with what follows from them."""
        return means

    def __call__(
        self,
        wrapped: nn.Module,
        batch: PackedPairs,
        loss: PairLoss,
        sums: MetricSums,
        coupled: CoupledPairs | None = None,
    ) -> PairLossOutput:
        """One forward pass inside `micro_batch`; gradients are recorded.

        Args:
            wrapped: the policy, as it is wrapped for training.
            batch: scored pairs, on any device.
            loss: the loss of each pair.
            sums: gets the batch's metrics.
            coupled: what a coupled loss asks of the pairs in addition.

        Returns:
            The loss summed over the batch's pairs, auxiliary loss included, and the other fields of
            PairLossOutput.
        """
        batch = batch.to(self.device)
        task = self.task(batch, loss)
        if coupled is not None:
            task = replace(task, extras=coupled.added_to(task.extras, batch))
        with same_dropout(coupled), self.autocast():
            results = run_batch(wrapped, batch, task, self.router_loss)
        output, more = add_router_loss(results, self.router_loss, batch.num_pairs)
        likelihood = None
        if batch.coefficients is not None:
            likelihood = batch.likelihood_of_pairs(output.logps)  # [P]
            more |= {NLL: likelihood.sum() / self.likelihood.weight}
        output = _of_pairs(output, batch)
        if coupled is not None:
            # The coefficients' sum has the gradients, but the loss another value.
            linear = (coupled.coefficients * output.logps).sum()
            output = replace(output, loss=output.loss + (coupled.losses.sum() - linear))
        metrics = dict(zip(METRIC_NAMES, output.metrics, strict=True))
        if self.own_metrics is not None:
            metrics |= self.own_metrics(output, batch)
        of_tokens, counts = token_metric_sums(self.token_metrics, output.statistics, batch.lengths)
        more |= of_tokens
        if not loss.is_reference_free:
            assert batch.ref_logps is not None
            kl, tokens = kl_sums(output.logps, batch.ref_logps, batch.lengths, batch.token_weights)
            more, counts = more | kl, counts | dict.fromkeys(kl, tokens)
        sums.add({**metrics, **more, "loss": output.loss}, batch.num_pairs, counts)
        if batch.sets is not None:
            if coupled is not None:
                losses = coupled.losses
            elif batch.num_pairs:
                losses, *_ = batch_losses(loss, output.logps, batch, output.pair_weights)
            else:
                losses = output.logps  # a user's own loss is never called without pairs
            if likelihood is not None:
                losses = losses + likelihood
            self._add_sets(batch, {**metrics, "loss": losses}, sums)
        return output

    def task(self, batch: PackedPairs, loss: PairLoss) -> PairLossTask:
        """What the head computes of a micro-batch, which is on the model's device."""
        extras = PairExtras(
            *(batch.pairs, batch.weights, batch.label_confidence),
            *(batch.coefficients, batch.token_weights),
            *(self.weighting, statistics_of(self.token_metrics)),
        )
        options = self.head_options()
        refs = batch.ref_of_sequences()
        return PairLossTask(batch.labels, batch.bounds, refs, loss, options, extras)

    def head_options(self) -> HeadOptions:
        """The options of the head's op with a loss."""
        options = head_options(causal_lm(self.model).config, self.head_backend)
        return replace(options, upstream=self.upstream)

    def _add_sets(self, batch: PackedPairs, metrics: dict[str, Tensor], sums: MetricSums) -> None:
        """Count the metrics of each dataset of a mixture."""
        values, counts = set_metrics(batch, metrics)
        if taken := sorted(values.keys() & metrics.keys()):
            raise ConfigError(
                f"metrics_fn: the names {', '.join(taken)} are those of a dataset's metrics; "
                "choose others."
            )
        sums.add(values, 0, counts)


def _of_pairs(output: PairLossOutput, batch: PackedPairs) -> PairLossOutput:
    """The output with the log-probs [2P] and statistics [K, 2P] of chosen_0, rejected_0, ..."""
    statistics = output.statistics
    return replace(
        output,
        logps=batch.of_pairs(output.logps),
        statistics=None if statistics is None else batch.of_pairs(statistics),
    )


def gradient_exchange(
    accelerator: Accelerator, model: nn.Module, is_last: bool
) -> contextlib.AbstractContextManager[Any]:
    """Inside the `with` block, a backward exchanges gradients between ranks only if `is_last`.

    Args:
        accelerator: the trainer's accelerator.
        model: the policy, as it is wrapped for training.
        is_last: whether this is the step's last micro-batch, which exchanges what all of them
            accumulated.
    """
    accelerator.gradient_state._set_sync_gradients(is_last)
    # DeepSpeed sees to this by itself.
    if is_last or accelerator.distributed_type == DistributedType.DEEPSPEED:
        return contextlib.nullcontext()
    return accelerator.no_sync(model)
