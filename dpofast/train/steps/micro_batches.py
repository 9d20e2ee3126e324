"""The policy's pass over a micro-batch of scored pairs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from dpofast.data.packing.batch import PackedPairs
from dpofast.model.forward import run_batch
from dpofast.model.head import PairLossTask, head_options
from dpofast.model.parts import causal_lm
from dpofast.model.router import RouterLoss, add_router_loss
from dpofast.monitor.metrics import MetricSums
from dpofast.train.own.metrics import OwnMetrics
from dpofast.train.steps.coupled import CoupledPairs, same_dropout
from dpofast_kernels import METRIC_NAMES, PairLoss, PairLossOutput


@dataclass(frozen=True, eq=False)
class PairLossPass:
    """Computes the loss of micro-batches, and counts their metrics.

    Attributes:
        model: the policy, not wrapped by DDP or DeepSpeed.
        router_loss: auxiliary loss of a mixture of experts' routers; None to train without it.
        autocast: makes the context of a forward pass.
        device: device of the policy.
        own_metrics: the user's metrics, if there are any.
    """

    model: nn.Module
    router_loss: RouterLoss | None
    autocast: Any
    device: torch.device
    own_metrics: OwnMetrics | None = None

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
        assert batch.ref_logps is not None
        options = head_options(causal_lm(self.model).config)
        task = PairLossTask(batch.labels, batch.bounds, batch.ref_logps, loss, options)
        if coupled is not None:
            extras = replace(task.extras, coefficients=coupled.coefficients)
            task = replace(task, extras=extras)
        with same_dropout(coupled), self.autocast():
            results = run_batch(wrapped, batch, task, self.router_loss)
        if coupled is not None:
            # The coefficients' sum has the gradients, but another value.
            linear, *rest = results
            results = (coupled.loss + (linear - linear.detach()), *rest)
        output, more = add_router_loss(results, self.router_loss, batch.num_pairs)
        metrics = dict(zip(METRIC_NAMES, output.metrics, strict=True))
        if self.own_metrics is not None:
            metrics |= self.own_metrics(output, batch)
        sums.add({**metrics, **more, "loss": output.loss}, batch.num_pairs)
        return output


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
