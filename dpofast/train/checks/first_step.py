"""Checks that a run's first step trains: it has a gradient, and its weights move.

Without this check a run whose gradients are cut off somewhere would go through all its steps at the
same loss, and save the model that it began with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.data.packing.batch import PackedPairs
from dpofast.errors import ModelError
from dpofast.model.pair_losses import batch_losses
from dpofast_kernels import PairLossOutput, PreferenceLoss

# Parameters up to this size are copied to see whether they move. Of larger ones a sum is kept.
COPIED_ELEMENTS = 1 << 16
# Slopes of the loss, in 1 / nats, that a gradient in float32 can lose as it is scaled on its way.
NO_SLOPE = 1e-20
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FirstStep:
    """Finds out whether the first step that should train anything does.

    Steps that rightly train nothing are passed over: those of a learning rate of 0, those that a
    loss scaler skips, and those where the loss is flat at all pairs, as hinge is beyond its margin.
    While the learning rate rises, a step may be too small for the weights' precision.

    Args:
        model: the policy, not wrapped.
        loss: the pair loss.
        is_fresh: whether the run begins here. In a resumed run only the gradient is checked, as its
            learning rate may be almost 0 already.
    """

    def __init__(self, model: nn.Module, loss: PreferenceLoss, is_fresh: bool = True) -> None:
        self.model, self.loss, self.is_fresh = model, loss, is_fresh
        self.has_slope = False
        self.is_unknown = False  # whether the slope of some pair isn't known
        self._rate: float | None = None  # of the step that has begun
        self._last_rate = 0.0
        self._peak = 0.0
        self._before: list[Tensor] = []

    def begin(self, groups: Sequence[dict[str, Any]]) -> None:
        """Note the weights and the learning rate before a step.

        Args:
            groups: the optimizer's parameter groups.
        """
        self.has_slope = False
        self._rate = max((float(group["lr"]) for group in groups), default=0.0)
        self._peak = max(float(group.get("initial_lr", group["lr"])) for group in groups)
        self._before = _fingerprints(self.model) if self.is_fresh and self._rate else []

    def add(
        self, output: PairLossOutput | None, batch: PackedPairs, slopes: Tensor | None = None
    ) -> None:
        """Note whether the loss has a slope at any pair of a micro-batch.

        Args:
            output: output of the batch's forward pass; None if a subclass has another loss.
            batch: the batch, with its reference log-probs.
            slopes: the loss's derivatives by the log-probs, if a coupled loss has given them.
        """
        if self.has_slope or not batch.num_pairs:
            return
        if output is None:
            self.is_unknown = True
            return
        if batch.coefficients is not None and bool(batch.coefficients.any()):
            self.has_slope = True
            return
        if slopes is None:
            # Where the model is, as a user's own loss may hold tensors.
            found = batch_losses(self.loss, output.logps, batch, output.pair_weights)
            slopes = torch.stack(found[1:])
        self.has_slope = bool((slopes.abs() > NO_SLOPE).any())

    def finish(
        self, norm: Any, was_skipped: bool, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> bool:
        """Judge the step that has ended. All ranks must call this at the same time.

        Args:
            norm: gradient norm before clipping, the same on all ranks; None if it isn't known.
            was_skipped: whether the optimizer has left the step out.
            sum_over_ranks: adds up a vector over the ranks.

        Returns:
            Whether no further step needs to be checked, as the run trains, or as a subclass has a
            loss whose slope isn't known.

        Raises:
            ModelError: it doesn't.
        """
        rate, self._rate = self._rate, None
        if rate is None:  # called again after the same step, as at the end of an epoch
            return False
        moved = any(
            not torch.equal(old, new)
            for old, new in zip(self._before, _fingerprints(self.model), strict=False)
        )
        self._before = []
        facts = torch.tensor([self.has_slope, moved, self.is_unknown], dtype=torch.float64)
        device = next(self.model.parameters()).device
        has_slope, moved, is_unknown = map(bool, sum_over_ranks(facts.to(device)).tolist())
        if is_unknown:
            return True
        if was_skipped or not has_slope:
            return False
        size = None if norm is None else float(norm)
        if size == 0.0:
            raise ModelError(_NO_GRADIENT)
        if size is not None and not math.isfinite(size):
            return True
        return self._has_moved(moved, rate)

    def _has_moved(self, moved: bool, rate: float) -> bool:
        if moved or not self.is_fresh:
            return True
        is_rising = self._last_rate < rate < self._peak
        self._last_rate = rate
        if rate and not is_rising:
            raise ModelError(
                f"No trained parameter has changed in a step with learning rate {rate:g}, so the "
                f"run would train nothing. {_why_unmoved(self.model)}"
            )
        return False


class ChecksFirstStep:
    """Makes a transformers Trainer stop after its first step if that has trained nothing.

    It comes before Trainer among a class's bases, and overrides one of its methods.
    """

    first_step: FirstStep | None = None  # only until a step has passed
    accelerator: Any
    sum_over_ranks: Any

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        if self.first_step is not None:
            was_skipped = bool(self.accelerator.optimizer_step_was_skipped)
            if self.first_step.finish(grad_norm, was_skipped, self.sum_over_ranks):
                self.first_step = None
        super()._maybe_log_save_evaluate(  # type: ignore[misc]
            tr_loss, grad_norm, *args, **kwargs
        )


def _fingerprints(model: nn.Module) -> list[Tensor]:
    """Values that change if a trained parameter does: this rank's part of it, or a sum of its bits.

    A sum needs no copy of the parameter. It is an integer, which no rounding hides a change from.
    """
    found = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            own: Any = getattr(parameter, "ds_tensor", parameter)  # this rank's part under ZeRO-3
            bits = own.detach().view(INTEGERS[own.element_size()])
            is_small = bits.numel() <= COPIED_ELEMENTS
            found.append(bits.clone() if is_small else bits.sum(dtype=torch.int64))
    return found


_NO_GRADIENT = (
    "The gradient norm of the first step is exactly 0, though the loss has a slope there, so the "
    "run would train nothing: no trained parameter has an effect on the loss. Does the model use "
    "the trained layers, and does nothing between them and the loss detach its result?"
)


def _why_unmoved(model: nn.Module) -> str:
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if dtypes <= {torch.bfloat16, torch.float16}:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return (
            f"The weights are {names}, which rounds such small updates away: load the model in "
            "float32 (dtype: float32) with bf16: true, or raise learning_rate."
        )
    return (
        "Does the optimizer hold the model's parameters, those of the adapter included? If it "
        "does, learning_rate is too small for their precision."
    )
