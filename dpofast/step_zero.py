"""The check of a fresh run's first batch: a policy that is its reference has zero log-ratios."""

from __future__ import annotations

import torch

from dpofast.data.batch import PackedPairs
from dpofast.errors import ModelError
from dpofast_kernels import PairLoss, PairLossOutput

# The largest difference of the batch's mean loss from the loss at zero log-ratios that rounding
# explains: answers of some thousand tokens, batched in another way when they were scored.
TOLERANCE = {
    torch.float64: 1e-7,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}


class StepZeroCheck:
    """Compares the first batch's loss with the loss at zero log-ratios (sigmoid: ln 2).

    Only for a policy of the reference's own identity, without dropout, before its first step.

    Args:
        loss: that is trained.
        dtype: in which the model computes.
    """

    def __init__(self, loss: PairLoss, dtype: torch.dtype) -> None:
        self.loss, self.tolerance = loss, TOLERANCE[dtype]

    def check(self, output: PairLossOutput, batch: PackedPairs) -> None:
        """Raise ModelError if the log-ratios of the first batch aren't zero but for rounding."""
        lengths = batch.bounds.diff().view(-1, 2)  # [P, 2]
        zeros = torch.zeros(batch.num_pairs, dtype=torch.float64)
        expected = self.loss.pair_loss(zeros, zeros, lengths)[0].mean().item()
        got = output.loss.item() / batch.num_pairs
        if abs(got - expected) <= self.tolerance:
            return
        assert batch.ref_logps is not None
        logratios = output.logps.cpu() - batch.ref_logps.cpu()
        raise ModelError(
            f"The first batch's loss is {got:.6f}, but the policy is its own reference before "
            f"step 1, which gives {expected:.6f} (log-ratios up to {logratios.abs().max():.3g}, "
            f"tolerance {self.tolerance:g} on the loss): the reference log-probs are not those of "
            "this model on these tokens. Was the model changed after the trainer was made? "
            "Otherwise check the store with `dpofast ref verify`."
        )
