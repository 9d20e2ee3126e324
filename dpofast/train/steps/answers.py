"""The policy's pass over a micro-batch of single answers, and what their loss compares with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.data.packing.answers import PackedAnswers
from dpofast.data.packing.batch import PackedPairs, StepBatch
from dpofast.errors import ConfigError
from dpofast.model.forward import evaluating, micro_batch, run_batch
from dpofast.model.head import ScoreTask, SequenceLossTask, head_options
from dpofast.model.parts import causal_lm
from dpofast.model.router import METRIC as ROUTER
from dpofast.model.router import add_router_loss
from dpofast.model.scored_answers import ScoredAnswers
from dpofast.monitor.kl import KL
from dpofast.monitor.metrics import MetricSums
from dpofast.train.steps.coupled import CoupledPairs
from dpofast.train.steps.micro_batches import PairLossPass
from dpofast_kernels import SEQUENCE_METRIC_NAMES, Answers, PairLossOutput, sum_per_sequence

CHOSEN, REJECTED, MARGINS = "rewards/chosen", "rewards/rejected", "rewards/margins"
OF_LABELS = tuple(
    f"{name}/{side}"
    for name in (*SEQUENCE_METRIC_NAMES, "logps")
    for side in ("chosen", "rejected")
)


@dataclass(frozen=True, eq=False)
class AnswerLossPass(PairLossPass):
    """Computes the loss of micro-batches of single answers, and counts their metrics.

    The metrics are means over the desirable answers (chosen) and over the others (rejected), under
    TRL's names. `kl` is z.
    """

    @property
    def names(self) -> tuple[str, ...]:
        return ("loss", *OF_LABELS, MARGINS, KL)

    def names_with(self, loss: Any) -> list[str]:
        names = list(self.names) if loss.takes_z else [n for n in self.names if n != KL]
        return [*names, *([ROUTER] if self.router_loss is not None else [])]

    def finish(self, means: dict[str, float]) -> dict[str, float]:
        """The means, and the mean reward of desirable answers minus that of the others."""
        if not {CHOSEN, REJECTED} <= means.keys():
            return means
        return {**means, MARGINS: means[CHOSEN] - means[REJECTED]}

    def __call__(
        self,
        wrapped: nn.Module,
        batch: PackedPairs,
        loss: Any,
        sums: MetricSums,
        coupled: CoupledPairs | None = None,
    ) -> PairLossOutput:
        """As PairLossPass, with PackedAnswers and an UnpairedLoss, which couples no pairs.

        Raises:
            ConfigError: the step hasn't estimated z.
        """
        batch = batch.to(self.device)
        assert isinstance(batch, PackedAnswers)
        assert batch.ref_logps is not None
        if loss.takes_z and batch.z is None:
            raise ConfigError(
                f"compute_loss: the loss {loss.name} compares with a mean over the whole step, "
                "which only training and evaluate() take; call these."
            )
        answers = Answers(batch.bounds, batch.ref_logps, batch.is_desirable, batch.z, batch.weights)
        task = SequenceLossTask(batch.labels, answers, loss, self.head_options())
        with self.autocast():
            results = run_batch(wrapped, batch, task, self.router_loss)
        output, more = add_router_loss(results, self.router_loss, batch.num_pairs)
        values, counts = label_metrics(output, batch)
        if batch.z is not None:
            values[KL] = batch.z * batch.num_pairs
        sums.add({**values, **more, "loss": output.loss}, batch.num_pairs, counts)
        return output


def label_metrics(
    output: PairLossOutput, batch: PackedAnswers
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The metrics of the answers of each label: sums by name, and what they are divided by."""
    values, counts = {}, {}
    columns = {**dict(zip(SEQUENCE_METRIC_NAMES, output.metrics, strict=True))}
    columns["logps"] = output.logps
    for side, mask in (("chosen", batch.is_desirable), ("rejected", ~batch.is_desirable)):
        for name, column in columns.items():
            # An answer of the other label may be NaN; times 0 it would still be.
            values[f"{name}/{side}"] = torch.where(mask, column, 0.0)
            counts[f"{name}/{side}"] = mask
    return values, counts


def mismatched_logratios(
    model: nn.Module,
    batches: Iterable[PackedPairs],
    autocast: Any,
    device: torch.device,
    head_backend: str = "auto",
) -> list[Tensor]:
    """The log-ratios of each micro-batch's mismatched answers: [S] fp64, without a gradient.

    The policy is in eval mode, as the reference was when it scored them.

    Args:
        model: the policy, not wrapped.
        batches: micro-batches of PackedAnswers.
        autocast: makes the context of a forward pass.
        device: device of the policy.
        head_backend: the head's back end, as in HeadOptions.
    """
    found = []
    options = head_options(causal_lm(model).config, head_backend)
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            assert isinstance(batch, PackedAnswers)
            # A micro-batch without answers runs one token: other ranks wait for its collectives.
            other = (batch if batch.mismatched is None else batch.mismatched).to(device)
            assert other.ref_logps is not None
            with micro_batch(model, other), autocast():
                scores = run_batch(model, other, ScoreTask(other.labels, options))
            logps = sum_per_sequence(scores, other.bounds)  # [S]
            found.append(logps - other.ref_logps)
    return found


def with_z(step: StepBatch, logratios: Sequence[Tensor], total: Tensor) -> StepBatch:
    """The step with its z: the mean of the mismatched log-ratios, or 0 if that is below 0.

    Args:
        step: this rank's part of the step.
        logratios: the log-ratios [S] of each micro-batch's mismatched answers.
        total: [] fp64, the sum of those of all ranks.
    """
    # Were it -inf, clamping would hide it.
    z = torch.where(total.isfinite(), total / step.num_pairs, torch.nan).clamp(min=0.0)
    batches: list[PackedPairs] = []
    for batch, own in zip(step.micro_batches, logratios, strict=True):
        assert isinstance(batch, PackedAnswers)
        batches.append(ScoredAnswers.with_z(batch, z, own))
    return replace(step, micro_batches=batches)
