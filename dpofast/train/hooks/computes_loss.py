"""The trainer's loss of a micro-batch, as the hooks `compute_loss` and `prediction_step`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from dpofast.data.packing.batch import PackedPairs, StepBatch
from dpofast.errors import ConfigError
from dpofast.model.forward import kept_activations, micro_batch
from dpofast.monitor.metrics import MetricSums
from dpofast.train.hooks.couples_pairs import CouplesPairs
from dpofast.train.hooks.overrides import override_of
from dpofast.train.hooks.untrained import detached, joined, untrained
from dpofast.train.reports.reports_run import ReportsRun
from dpofast.zero.weights import spread
from dpofast_kernels import NotAPairLossError, PairLossOutput


@dataclass(frozen=True, eq=False)
class Computed:
    """What the last call of `compute_pair_loss` computed.

    Attributes:
        output: its output; None if an overridden `compute_loss` didn't call it.
        sums: metrics of its pairs.
    """

    output: PairLossOutput | None = None
    sums: MetricSums = field(default_factory=MetricSums)


class ComputesLoss(CouplesPairs, ReportsRun, Trainer):
    """Gives a transformers Trainer the loss of pairs, which subclasses may override.

    docs/extending.md describes what an override gets, and what it must return.
    """

    _computed = Computed()
    _open: PackedPairs | None = None  # the micro-batch that the model is prepared for

    def compute_pair_loss(
        self, model: nn.Module, batch: PackedPairs, sums: MetricSums
    ) -> PairLossOutput:
        """One forward pass inside `micro_batch`; arguments and result are those of PairLossPass.

        A backward pass through the log-probs or the metrics of the result is an error.

        Raises:
            ConfigError: a loss_fn returned no loss for each pair, or the loss couples pairs and
                isn't known for this micro-batch.
        """
        whole = self.step_loss() if self._trains(model) else self.pair_loss
        loss, coupled = self.loss_of(batch, whole)
        try:
            return untrained(self._pair_loss_pass(model, batch, loss, sums, coupled))
        except NotAPairLossError as error:
            raise ConfigError(f"loss_fn: {error}") from error

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the mean loss over the pairs of a micro-batch.

        Training and evaluation call this for each micro-batch, and weight the results by their
        pairs. Whatever an override adds to the loss therefore counts once for each step.

        Args:
            model: the policy, as it is wrapped for training, or `trainer.model`.
            inputs: a micro-batch; or an item of a data loader, which holds those of a step.
            return_outputs: also return the outputs.
            num_items_in_batch: ignored.

        Returns:
            The loss [] fp64, differentiable. It is 0 for a micro-batch without pairs. For an item
            of a loader, the mean over ranks of this number is the mean over the step's pairs.
            With `return_outputs` a pair: the loss, and a PairLossOutput whose log-probs and
            metrics have no gradients; a backward pass through them is an error.

        Raises:
            ConfigError: `inputs` is something else.
        """
        if isinstance(inputs, StepBatch):
            loss, output = self._loss_of_step(model, inputs)
        elif isinstance(inputs, PackedPairs):
            loss, output = self._loss_of_pairs(model, inputs)
        else:
            raise ConfigError(
                f"compute_loss: got a {type(inputs).__name__}, expected an item of one of the "
                "trainer's data loaders, or one of its micro_batches; see docs/extending.md."
            )
        return (loss, output) if return_outputs else loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Return the argument, for overrides that were copied from transformers."""
        return inputs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool = True,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Compute the loss and the log-probs of a micro-batch without gradients.

        Args:
            model, inputs: as in `compute_loss`.
            prediction_loss_only: leave out the log-probs.
            ignore_keys: ignored.

        Returns:
            The loss [], the log-probs [P, 2] of chosen and rejected or None, and None for labels.

        Raises:
            ConfigError: an overridden compute_loss returned no pair of loss and outputs.
        """
        self._computed = Computed()
        with torch.no_grad(), self.compute_loss_context_manager():
            result = self.compute_loss(model, inputs, return_outputs=True)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor)):
            raise ConfigError(
                f"{override_of(self, 'compute_loss')}: evaluation calls it with "
                f"return_outputs=True, and expects (loss, outputs), but got a "
                f"{type(result).__name__}."
            )
        loss, output = result[0].detach(), self._computed.output
        if prediction_loss_only or output is None:
            return loss, None, None
        return loss, output.logps.view(-1, 2), None

    def _loss_of_pairs(self, model: nn.Module, batch: PackedPairs) -> tuple[Tensor, PairLossOutput]:
        """Mean loss of a micro-batch, with the metrics of its pairs in `_computed`."""
        sums = MetricSums()
        is_counted = self._open is batch
        with self._prepared(batch):
            output = self.compute_pair_loss(model, batch, sums)
        self._computed = Computed(detached(output), sums)
        if self._trains(model):
            self.note_drift(sums)
            if not is_counted:  # an overridden training_step may call this by itself
                self.metric_sums.add(sums.totals, batch.num_pairs, sums.counts)
        return output.loss / max(batch.num_pairs, 1), output

    def _trains(self, model: nn.Module) -> bool:
        """Whether a pass of the model belongs to a training step, not to an evaluation."""
        return bool(self.is_in_train and model.training)

    def _loss_of_step(self, model: nn.Module, step: StepBatch) -> tuple[Tensor, PairLossOutput]:
        self.couple(step)
        outputs = [self._loss_of_pairs(model, batch)[1] for batch in step.micro_batches]
        output = joined(outputs)
        self._computed = Computed(output)
        return output.loss * (self.args.world_size / step.num_pairs), output

    @contextlib.contextmanager
    def _prepared(self, batch: PackedPairs) -> Iterator[None]:
        """Inside the `with` block, the model is prepared for this micro-batch."""
        if self._open is batch:
            yield
            return
        before, self._open = self._open, batch
        try:
            # A backward that comes after the block can't recompute what isn't kept.
            with micro_batch(self.model, batch), kept_activations(self.model):
                yield
        finally:
            self._open = before

    @contextlib.contextmanager
    def opened(self, batch: PackedPairs) -> Iterator[None]:
        """Inside the `with` block, forward and backward of this micro-batch can run."""
        self._computed, self._open = Computed(), batch
        try:
            with micro_batch(self.model, batch):
                yield
        finally:
            self._computed, self._open = Computed(), None

    @contextlib.contextmanager
    def names_sharded_terms(self) -> Iterator[None]:
        """Say what is wrong if a backward in the `with` block fails as ZeRO-3 shards the weights.

        Raises:
            ConfigError: an overridden `compute_loss` has made a term of them.
        """
        try:
            yield
        except RuntimeError as error:
            where = override_of(self, "compute_loss")
            is_shape = any(
                part in str(error) for part in ("invalid gradient", "must match the size")
            )
            if where and is_shape and spread(self.model.parameters()):
                raise ConfigError(
                    f"{where}: the loss has a term made from the model's weights, but ZeRO-3 "
                    f"shards them over the ranks; use zero2, or leave the term out ({error})."
                ) from error
            raise

    def count(self, sums: MetricSums, loss: Any, batch: PackedPairs, *hooks: str) -> None:
        """Add the metrics of a micro-batch that was just computed.

        Args:
            sums: gets the metrics.
            loss: mean loss of the pairs as the hooks returned it; None for none.
            batch: the micro-batch.
            hooks: methods that an override may have computed the loss in.

        Raises:
            ConfigError: an override returned no single number.
        """
        totals, counts = self._computed.sums.totals, self._computed.sums.counts
        overrides = [where for hook in hooks if (where := override_of(self, hook))]
        # Without an override the totals have the exact sum, which was never divided by the pairs.
        if loss is not None and overrides:
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ConfigError(
                    f"{overrides[-1]}: the loss that it returned is {got}, expected the mean loss "
                    "over the micro-batch's pairs, a tensor []."
                )
            totals["loss"] = loss.detach().double().sum() * batch.num_pairs
        sums.add(totals, batch.num_pairs, counts)

    def check_loss(self, loss: Any) -> None:
        """Check what an overridden `compute_loss` returned in training.

        Raises:
            ConfigError: it is no number with a gradient.
        """
        if isinstance(loss, Tensor) and loss.shape == () and loss.requires_grad:
            return
        got = (
            f"a tensor {list(loss.shape)}{'' if loss.requires_grad else ' without a gradient'}"
            if isinstance(loss, Tensor)
            else f"a {type(loss).__name__}"
        )
        raise ConfigError(
            f"{override_of(self, 'compute_loss')}: it returned {got}, expected the mean loss over "
            "the micro-batch's pairs, a tensor [] with a gradient."
        )
