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
from dpofast.model.router import RouterLoss, add_router_loss
from dpofast.monitor.kl import kl_sums
from dpofast.monitor.metrics import MetricSums
from dpofast.monitor.set_metrics import set_metrics
from dpofast.train.own.metrics import MEASURED, NLL, OwnMetrics
from dpofast_kernels import METRIC_NAMES, PairExtras, PairLoss, PairLossOutput


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
    """

    model: nn.Module
    router_loss: RouterLoss | None
    autocast: Any
    device: torch.device
    own_metrics: OwnMetrics | None = None
    likelihood: Likelihood = NO_LIKELIHOOD

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics that every pass counts, and what `finish` adds to their means."""
        return MEASURED

    def finish(self, means: dict[str, float]) -> dict[str, float]:
        """The means of the metrics, with what follows from them."""
        return means

    def __call__(
        self, wrapped: nn.Module, batch: PackedPairs, loss: PairLoss, sums: MetricSums
    ) -> PairLossOutput:
        """One forward pass inside `micro_batch`; gradients are recorded.

        Args:
            wrapped: the policy, as it is wrapped for training.
            batch: scored pairs, on any device.
            loss: the loss of each pair.
            sums: gets the batch's metrics.

        Returns:
            The loss summed over the batch's pairs, auxiliary loss included, and the other fields of
            PairLossOutput.
        """
        batch = batch.to(self.device)
        with self.autocast():
            results = run_batch(wrapped, batch, self._task(batch, loss), self.router_loss)
        output, more = add_router_loss(results, self.router_loss, batch.num_pairs)
        if batch.coefficients is not None:
            more |= {NLL: self._mean_nll(output, batch)}
            output = replace(output, logps=output.logps[: 2 * batch.num_pairs])
        metrics = dict(zip(METRIC_NAMES, output.metrics, strict=True))
        if self.own_metrics is not None:
            metrics |= self.own_metrics(output, batch)
        counts: dict[str, Tensor] = {}
        if not loss.is_reference_free:
            assert batch.ref_logps is not None
            kl, tokens = kl_sums(output.logps, batch.ref_logps, batch.bounds)
            more, counts = more | kl, dict.fromkeys(kl, tokens)
        sums.add({**metrics, **more, "loss": output.loss}, batch.num_pairs, counts)
        if batch.sets is not None:
            self._add_sets(batch, loss, output, metrics, sums)
        return output

    def _task(self, batch: PackedPairs, loss: PairLoss) -> PairLossTask:
        ref_logps, pairs = batch.ref_logps, None
        assert ref_logps is not None
        if batch.prompts is not None:
            # The prompts are sequences after those of the pairs, and in none of the pairs.
            pairs = torch.arange(2 * batch.num_pairs).view(-1, 2)
            ref_logps = torch.cat([ref_logps, ref_logps.new_zeros(len(batch.prompts))])
        extras = PairExtras(
            *(pairs, batch.weights, batch.label_confidence),
            *(batch.coefficients, batch.token_weights),
        )
        options = head_options(causal_lm(self.model).config)
        return PairLossTask(batch.labels, batch.bounds, ref_logps, loss, options, extras)

    def _mean_nll(self, output: PairLossOutput, batch: PackedPairs) -> Tensor:
        """The likelihood terms without their weight, summed over the pairs: []."""
        assert batch.coefficients is not None
        return (batch.coefficients * output.logps).sum() / self.likelihood.weight

    def _add_sets(
        self,
        batch: PackedPairs,
        loss: PairLoss,
        output: PairLossOutput,
        metrics: dict[str, Tensor],
        sums: MetricSums,
    ) -> None:
        """Count the metrics of each dataset of a mixture."""
        # A user's own loss is never called without pairs.
        losses = batch_losses(loss, output.logps, batch)[0] if batch.num_pairs else output.logps
        values, counts = set_metrics(batch, metrics | {"loss": losses})
        if taken := sorted(values.keys() & metrics.keys()):
            raise ConfigError(
                f"metrics_fn: the names {', '.join(taken)} are those of a dataset's metrics; "
                "choose others."
            )
        sums.add(values, 0, counts)


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
