"""The first phase of a step whose loss couples pairs: what the loss of all of them asks of each.

Before any derivative is known, a forward pass over the step's micro-batches finds the log-probs of
its pairs. The ranks gather them, and each computes the loss of the whole step and its derivatives
by each log-prob. The second phase is the usual forward and backward, in which these derivatives are
coefficients of the log-probs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.data.packing.batch import PackedPairs, StepBatch
from dpofast.errors import ConfigError
from dpofast.model.forward import kept_activations, micro_batch, run_batch
from dpofast.model.head import PairLossTask
from dpofast_kernels import (
    CoupledLoss,
    NotAPairLossError,
    PairExtras,
    PairLoss,
    PreferenceLoss,
    ZeroLoss,
    sum_per_sequence,
)

NUM_COLUMNS = 6  # of a pair: log-probs of policy and reference, and lengths, of both answers


@dataclass(frozen=True, eq=False)
class RandomState:
    """The state of the random number generators from which dropouts draw.

    Attributes:
        device: the model's device.
        states: states of the CPU's generator and of the device's.
    """

    device: torch.device
    states: tuple[Tensor, ...]

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The present state."""
        if device.type == "cpu":
            return cls(device, (torch.get_rng_state(),))
        own = torch.get_device_module(device).get_rng_state(device)
        return cls(device, (torch.get_rng_state(), own))

    def restore(self) -> None:
        """Make this the present state."""
        torch.set_rng_state(self.states[0])
        for own in self.states[1:]:
            torch.get_device_module(self.device).set_rng_state(own, self.device)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside the `with` block, the numbers that were drawn from this state are drawn again."""
        present = RandomState.now(self.device)
        self.restore()
        try:
            yield
        finally:
            present.restore()


@dataclass(frozen=True, eq=False)
class CoupledPairs:
    """What a coupled loss of a whole step asks of the pairs of one micro-batch.

    Attributes:
        losses: [P] fp64, the losses of the pairs.
        coefficients: [2P] fp64, derivatives of the step's summed loss by their log-probs.
        random_state: where the first phase's dropouts began; None in evaluation.
    """

    losses: Tensor
    coefficients: Tensor
    random_state: RandomState | None = None

    @classmethod
    def without_slopes(cls, losses: Tensor) -> CoupledPairs:
        """For an evaluation, which has no gradients."""
        return cls(losses, losses.new_zeros(2 * len(losses)))

    def added_to(self, extras: PairExtras, batch: PackedPairs) -> PairExtras:
        """What the head takes of the micro-batch, with these coefficients of its pairs."""
        coefficients = _of_sequences(self.coefficients, batch)
        if extras.coefficients is not None:
            coefficients = coefficients + extras.coefficients
        return replace(extras, coefficients=coefficients)


def _of_sequences(
    per_answer: Tensor,  # [2P]
    batch: PackedPairs,
) -> Tensor:
    """[S]: for each sequence, the sum over the pairs that have it."""
    if batch.pairs is None:
        return per_answer
    flat = batch.pairs.flatten()
    # [2P]; a copy that the host doesn't wait for
    slots = torch.argsort(flat, stable=True).to(per_answer.device, non_blocking=True)
    counts = torch.bincount(flat, minlength=len(batch.bounds) - 1)  # [S]
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    # In the same order every time, unlike index_add_ on a GPU.
    return sum_per_sequence(per_answer[slots], bounds)


def same_dropout(coupled: CoupledPairs | None) -> contextlib.AbstractContextManager[None]:
    """Inside the `with` block, a forward pass has the dropouts of the first phase, if there is one.

    Args:
        coupled: what the first phase found for the micro-batch; None without a coupled loss.
    """
    if coupled is None or coupled.random_state is None:
        return contextlib.nullcontext()
    return coupled.random_state.again()


@dataclass(frozen=True, eq=False)
class CoupledPass:
    """Finds what a coupled loss asks of the pairs of a step.

    Attributes:
        model: the policy, not wrapped by DDP or DeepSpeed.
        task: what the head computes of a micro-batch, given a loss of pairs.
        autocast: makes the context of a forward pass.
        device: device of the policy.
        gather: brings the rows of all ranks, [P, ...] each, to every rank, [ranks x P, ...].
        rank: this process's rank.
    """

    model: nn.Module
    task: Callable[[PackedPairs, PairLoss], PairLossTask]
    autocast: Any
    device: torch.device
    gather: Callable[[Tensor], Tensor]
    rank: int

    def __call__(self, step: StepBatch, loss: CoupledLoss) -> list[CoupledPairs]:
        """Run the first phase of a step; all ranks must call this together.

        Args:
            step: this rank's part of it.
            loss: the coupled loss.

        Returns:
            One for each micro-batch.

        Raises:
            ConfigError: the step doesn't say which pairs it has, or a user's function returned no
                loss for each pair.
        """
        sizes = [len(pairs) for pairs in step.indices]
        is_known = sizes == [batch.num_pairs for batch in step.micro_batches]
        if not is_known or sum(sizes) > step.num_pairs:
            raise ConfigError(
                f"get_train_dataloader: the {loss.name} loss couples the pairs of a step, but the "
                "indices of its StepBatch don't say which pairs it has; return what "
                "super().get_train_dataloader() returns."
            )
        states, tables = [], []
        for batch in step.micro_batches:
            states.append(RandomState.now(self.device))
            tables.append(self.table(batch))
        table, places = self._gathered(step, torch.cat(tables))
        losses, slopes = _losses_and_slopes(loss, table)
        found, start = [], 0
        for batch, state in zip(step.micro_batches, states, strict=True):
            own = places[start : start + batch.num_pairs]
            start += batch.num_pairs
            found.append(CoupledPairs(losses[own], slopes[own].flatten(), state))
        return found

    def table(self, batch: PackedPairs) -> Tensor:
        """Run a forward pass over a micro-batch, in the model's present mode.

        Returns:
            [P, NUM_COLUMNS] fp64: its pairs, as `losses_of_table` takes them.
        """
        moved = batch.to(self.device)
        assert moved.ref_logps is not None
        prepared = (micro_batch(self.model, batch), kept_activations(self.model))
        with torch.no_grad(), prepared[0], prepared[1], self.autocast():
            task = self.task(moved, ZeroLoss())
            # Whatever else the run measures, the second phase does.
            task = replace(task, extras=replace(task.extras, weighting=None, statistics=()))
            _, logps, *_ = run_batch(self.model, moved, task)
        lengths = batch.lengths.to(self.device, non_blocking=True)
        columns = (moved.of_pairs(logps), moved.ref_logps, lengths)
        return torch.cat([each.double().view(-1, 2) for each in columns], 1)

    def _gathered(self, step: StepBatch, own: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of all ranks in the order of the dataset, and the places of this rank's ones.

        That order doesn't depend on how the pairs are spread. Sizes are known beforehand, so that
        the host needn't wait for a device.
        """
        indices = [float(index) for pairs in step.indices for index in pairs]
        # The rows that this rank leaves to the others come last.
        rows = own.new_full((step.num_pairs, 1 + NUM_COLUMNS), torch.nan)
        rows[:, 0] = torch.inf
        rows[: len(own), 0] = torch.tensor(indices, dtype=torch.float64).to(
            self.device, non_blocking=True
        )
        rows[: len(own), 1:] = own
        gathered = self.gather(rows)  # [ranks x P, 1 + NUM_COLUMNS]
        order = torch.argsort(gathered[:, 0], stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        start = self.rank * step.num_pairs
        return gathered[order[: step.num_pairs], 1:], places[start : start + len(own)]


def losses_of_table(loss: PreferenceLoss, table: Tensor) -> Tensor:
    """The losses [P] of pairs that are computed together, without gradients.

    Args:
        loss: any loss.
        table: [P, NUM_COLUMNS] fp64; log-probs of the policy, of the reference, and lengths.

    Raises:
        ConfigError: a user's function returned no loss for each pair.
    """
    with torch.no_grad(), _named_loss_fn():
        return loss.losses(*_columns(table))


def _losses_and_slopes(
    loss: CoupledLoss,
    table: Tensor,  # [P, NUM_COLUMNS]
) -> tuple[Tensor, Tensor]:
    """Losses [P], and the derivatives [P, 2] of their sum by the log-probs of both answers."""
    with _named_loss_fn():
        losses, *slopes = loss.losses_and_slopes(*_columns(table))
    found = torch.stack(slopes, 1)
    is_finite = found.isfinite()
    # The head takes finite coefficients only. The loss shows that there were others.
    losses = torch.where(is_finite.all(1), losses, torch.nan)
    return losses, torch.where(is_finite, found, 0.0)


def _columns(
    table: Tensor,  # [P, NUM_COLUMNS]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `PreferenceLoss.losses`."""
    chosen, rejected, ref_chosen, ref_rejected, *lengths = table.unbind(1)
    return chosen, rejected, ref_chosen, ref_rejected, torch.stack(lengths, 1).long()


@contextlib.contextmanager
def _named_loss_fn() -> Iterator[None]:
    """Say whose fault it is if a user's function returns no loss for each pair."""
    try:
        yield
    except NotAPairLossError as error:
        raise ConfigError(f"loss_fn: {error}") from error
