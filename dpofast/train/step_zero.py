"""Checks a fresh run's first batch: a policy that equals its reference has zero log-ratios."""

from __future__ import annotations

import torch
from torch import nn

from dpofast.data.packing.batch import PackedPairs
from dpofast.errors import ModelError
from dpofast.model.dropout import dropouts
from dpofast.train.reference import RunReference
from dpofast_kernels import PairLoss, PairLossOutput

# The largest mean log-ratio per token, in nats, that rounding explains: the reference was scored in
# batches of other shapes. A wrong reference is off by tenths of nats or more.
TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


class StepZeroCheck:
    """Checks that the first batch has zero log-ratios, where the loss is known (sigmoid: ln 2).

    This holds for a policy with the identity of its reference, without dropout, before step 1. The
    check bounds the log-ratios rather than the loss, whose slope depends on beta.

    Args:
        loss: the loss that is trained; its value goes into the message.
        dtype: dtype that the forward pass computes in.
    """

    def __init__(self, loss: PairLoss, dtype: torch.dtype) -> None:
        self.loss, self.tolerance = loss, TOLERANCE[dtype]

    @classmethod
    def of(cls, policy: nn.Module, reference: RunReference, loss: PairLoss) -> StepZeroCheck | None:
        """The check of a fresh run; None where the policy needn't begin with zero log-ratios."""
        if next(dropouts(policy), None) or not reference.policy_starts_as_reference():
            return None
        return cls(loss, reference.dtype())

    def check(self, output: PairLossOutput, batch: PackedPairs) -> None:
        """Compares the log-ratios of the first batch with zero.

        Args:
            output: output of the batch's forward pass.
            batch: the batch, with its reference log-probs and at least one pair.

        Raises:
            ModelError: the log-ratios are larger than rounding explains.
        """
        assert batch.ref_logps is not None
        lengths = batch.bounds.diff()  # [2P]
        logratios = output.logps.cpu() - batch.ref_logps.cpu()  # [2P]
        per_token = (logratios.abs() / lengths).mean().item()
        if per_token <= self.tolerance:
            return
        got, expected = (
            self.loss.pair_loss(chosen, rejected, lengths.view(-1, 2))[0].mean().item()
            for chosen, rejected in (
                (logratios[0::2], logratios[1::2]),
                (torch.zeros_like(logratios[0::2]), torch.zeros_like(logratios[1::2])),
            )
        )
        raise ModelError(
            f"The first batch's loss is {got:.6f}, but the policy is its own reference before "
            f"step 1, which gives {expected:.6f} (log-ratios of {per_token:.3g} nats per token, "
            f"where rounding explains {self.tolerance:g}): the reference log-probs are not those "
            "of this model on these tokens. Was the model changed after the trainer was made? "
            "Otherwise check the store with `dpofast ref verify`."
        )
