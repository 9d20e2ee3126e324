"""The trainer's first phase of a step whose loss couples pairs, and what the second one reads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from dpofast.data.packing.batch import PackedPairs, StepBatch
from dpofast.errors import ConfigError
from dpofast.options.weighting_fields import refuse_weighting_of_coupled
from dpofast.train.steps.coupled import CoupledPairs, CoupledPass
from dpofast.train.steps.micro_batches import PairLossPass
from dpofast_kernels import CoupledLoss, PreferenceLoss

logger = logging.getLogger(__name__)


class CouplesPairs(Trainer):
    """Gives a transformers Trainer what a coupled loss of a whole step asks of each micro-batch."""

    pair_loss: PreferenceLoss
    step_loss: Callable[[], PreferenceLoss]
    _pair_loss_pass: PairLossPass
    # By the identity of the micro-batch, which is kept so that no other one gets it.
    _coupled: dict[int, tuple[PackedPairs, CoupledPairs]] = {}  # noqa: RUF012  (never changed)

    @property
    def couples_pairs(self) -> bool:
        """Whether the loss of a pair depends on the other pairs."""
        return isinstance(self.pair_loss, CoupledLoss)

    def say_what_coupling_costs(self) -> None:
        """Log it, if the loss couples pairs."""
        if self.couples_pairs:
            logger.info(
                "The %s loss couples the pairs of a step: each step begins with a forward pass "
                "over them that finds their log-probs, about a third more computation. Tokens per "
                "second count every token once, and mfu doesn't count this pass.",
                " + ".join(self.pair_loss.names),
            )  # fmt: skip

    def couple(self, step: StepBatch) -> None:
        """Run the first phase of a step, if the loss couples pairs. All ranks must call this.

        Raises:
            ConfigError: the step doesn't say which pairs it has, or a user's function returned no
                loss for each pair.
        """
        self.uncouple()
        loss = self.step_loss() if self.is_in_train else self.pair_loss
        if not isinstance(loss, CoupledLoss):
            return
        with self.compute_loss_context_manager():
            found = self.coupled_pass()(step, loss)
        self._keep(step, found)

    def coupled_pass(self) -> CoupledPass:
        """What runs the first phase."""
        one_pass, accelerator = self._pair_loss_pass, self.accelerator
        return CoupledPass(
            *(self.model, one_pass.task, one_pass.autocast, one_pass.device),
            *(accelerator.gather, accelerator.process_index),
        )

    def couple_evaluated(self, step: StepBatch, losses: Tensor | None) -> None:
        """Note the losses of a step of an evaluation, if the loss couples pairs.

        Args:
            step: the step.
            losses: [n] fp64, those of all pairs of the dataset; None to leave them out.
        """
        if not self.couples_pairs:
            return
        device = self._pair_loss_pass.device
        found = []
        for pairs in step.indices:
            nothing = torch.zeros(len(pairs), dtype=torch.float64, device=device)
            own = nothing if losses is None else losses[pairs].to(device)
            found.append(CoupledPairs.without_slopes(own))
        self._keep(step, found)

    def uncouple(self) -> None:
        """Forget the step."""
        self._coupled = {}

    def coupled_slopes(self, batch: PackedPairs) -> Tensor | None:
        """[2P]: derivatives of a coupled loss by a micro-batch's log-probs; None without one."""
        kept = self._coupled.get(id(batch))
        return None if kept is None else kept[1].coefficients

    def loss_of(self, batch: PackedPairs, loss: PreferenceLoss) -> tuple[Any, CoupledPairs | None]:
        """The loss of a micro-batch's pairs by themselves, and what a coupled loss asks of them.

        Args:
            batch: the micro-batch.
            loss: the loss of the run or of the step.

        Raises:
            ConfigError: a coupled loss isn't known for this micro-batch, or pairs are weighted.
        """
        if not isinstance(loss, CoupledLoss):
            return loss, None
        refuse_weighting_of_coupled(loss, self._pair_loss_pass.weighting)
        if (kept := self._coupled.get(id(batch))) is None:
            raise ConfigError(
                f"compute_loss: the {loss.name} loss couples all pairs of a step, so it isn't "
                "known for this micro-batch by itself: pass an item of one of the trainer's "
                "loaders, which holds the step, or in an override pass on the micro-batch that it "
                "got."
            )
        return loss.linear, kept[1]

    def _keep(self, step: StepBatch, found: list[CoupledPairs]) -> None:
        pairs = zip(step.micro_batches, found, strict=True)
        self._coupled = {id(batch): (batch, coupled) for batch, coupled in pairs}
