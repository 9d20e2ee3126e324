"""Checks a fresh run's first batch: a policy that equals its reference has zero log-ratios."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dpofast.data.packing.batch import PackedPairs
from dpofast.errors import ModelError
from dpofast.model.dropout import dropouts
from dpofast.model.forward import evaluating, run_batch
from dpofast.model.head import ScoreTask, head_options
from dpofast.model.pair_losses import batch_losses
from dpofast.model.parts import causal_lm
from dpofast.model.randomness import training_mode_for_a_look
from dpofast.train.reference.run_reference import RunReference
from dpofast.zero.weights import spread
from dpofast_kernels import PairLossOutput, PreferenceLoss, UnpairedLoss, sum_per_sequence

# The largest mean log-ratio per token, in nats, that rounding explains: the reference was scored in
# batches of other shapes. A wrong reference is off by tenths of nats or more.
TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
# The same of log-probs of tokens that were stored, which rounds them to float32.
STORED_TOLERANCE = 1e-5


class StepZeroCheck:
    """Checks that the first batch has zero log-ratios, where the loss is known.

    This holds for a policy with the identity of its reference, without dropout, before step 1. The
    check bounds the log-ratios rather than the loss, whose slope depends on beta.

    Args:
        policy: the model that is trained.
        reference: the reference, which the policy equals.
        loss: the loss that is trained; its value goes into the message.
    """

    def __init__(self, policy: nn.Module, reference: RunReference, loss: PreferenceLoss) -> None:
        self.policy, self.loss = policy, loss
        self.autocast = reference.accelerator.autocast
        self.tolerance = TOLERANCE[reference.dtype()]
        if reference.store.ld_alpha is not None:  # then tokens are read, not sums
            self.tolerance = max(self.tolerance, STORED_TOLERANCE)
        self.wants_noise = not reference.disables_dropout
        self.head = head_options(causal_lm(policy).config, reference.head_backend)

    @classmethod
    def of(
        cls, policy: nn.Module, reference: RunReference, loss: PreferenceLoss
    ) -> StepZeroCheck | None:
        """The check of a fresh run; None where the policy needn't begin with zero log-ratios."""
        if next(dropouts(policy), None) or not reference.policy_starts_as_reference():
            return None
        return cls(policy, reference, loss)

    def check(self, output: PairLossOutput, batch: PackedPairs) -> None:
        """Compares the log-ratios of the first batch with zero, inside its `micro_batch`.

        Args:
            output: output of the batch's forward pass.
            batch: the batch, with its reference log-probs and at least one pair.

        Raises:
            ModelError: the log-ratios are larger than rounding explains.
        """
        assert batch.ref_logps is not None
        logratios = output.logps.cpu() - batch.ref_logps.cpu()  # [2P]
        per_token = self._per_token(logratios, batch)
        if not math.isfinite(per_token):
            return  # the vote of this step ends the run, and says where the NaN is
        if per_token <= self.tolerance or (self.wants_noise and self._is_random(batch)):
            return
        got = self._mean_loss(logratios, batch, output.pair_weights)
        expected = self._first_loss(batch, output.pair_weights)
        raise ModelError(
            f"The first batch's loss is {got:.6f}, but the policy is its own reference before "
            f"step 1, which gives {expected:.6f} (log-ratios of {per_token:.3g} nats per token, "
            f"where rounding explains {self.tolerance:g}): {self._reason(batch)}"
        )

    def _mean_loss(
        self, logratios: Tensor, batch: PackedPairs, pair_weights: Tensor | None
    ) -> float:
        """Mean loss over a batch's pairs with these log-ratios [2P], on the policy's device."""
        assert batch.ref_logps is not None
        logps = (batch.ref_logps.cpu() + logratios).to(self._device())
        return batch_losses(self.loss, logps, batch, pair_weights)[0].mean().item()

    def _first_loss(self, batch: PackedPairs, pair_weights: Tensor | None) -> float:
        """Mean loss over a batch's pairs while the policy is its own reference."""
        plain = all(each is None for each in (batch.weights, batch.label_confidence, pair_weights))
        if plain and not isinstance(self.loss, UnpairedLoss):
            return self.loss.first_value(batch.lengths.to(self._device())).mean().item()
        assert batch.ref_logps is not None
        return self._mean_loss(torch.zeros_like(batch.ref_logps.cpu()), batch, pair_weights)

    def _device(self) -> torch.device:
        """Where losses are computed: a user's own loss may hold tensors on the policy's device."""
        return next(self.policy.parameters()).device

    def _per_token(self, difference: Tensor, batch: PackedPairs) -> float:
        """Mean difference of log-probs per token; `difference` [2P] is that of whole answers."""
        return (difference.abs() / batch.lengths.flatten()).mean().item()

    def _reason(self, batch: PackedPairs) -> str:
        """Finds out whether the policy itself explains log-ratios that aren't zero."""
        kind = type(causal_lm(self.policy)).__name__
        if self._is_random(batch):
            return (
                f"{kind} is random in training mode, as two passes over this batch differ. Set "
                "that noise to 0 in the model's config, or disable_dropout: false to train with it."
            )
        if self._equals_at_rest(batch):
            return (
                f"{kind} computes something else in training mode than in eval mode, in which the "
                "reference is scored. Please report this model type."
            )
        return (
            "the reference log-probs are not those of this model on these tokens. Was the model "
            "changed after the trainer was made? Otherwise check the store with `dpofast ref "
            "verify`."
        )

    def _is_random(self, batch: PackedPairs) -> bool:
        """Whether two passes in training mode differ; False where ZeRO-3's hooks count passes."""
        if spread(self.policy.parameters()):
            return False
        with training_mode_for_a_look(self.policy):
            first, second = self._logps(batch), self._logps(batch)
        return self._per_token(first - second, batch) > self.tolerance / 10

    def _equals_at_rest(self, batch: PackedPairs) -> bool:
        """Whether the policy has the reference's log-probs in eval mode."""
        if spread(self.policy.parameters()):
            return False
        assert batch.ref_logps is not None
        with evaluating(self.policy):
            difference = self._logps(batch) - batch.ref_logps.cpu()
        return self._per_token(difference, batch) <= self.tolerance

    def _logps(self, batch: PackedPairs) -> Tensor:
        """[2P] fp64: log-probs of the batch's answers in the policy's present mode, on the CPU."""
        batch = batch.to(next(self.policy.parameters()).device)
        with self.autocast():
            task = ScoreTask(batch.labels, self.head)
            scores = run_batch(self.policy, batch, task).double().cpu()  # [N]
        if batch.token_weights is not None:
            scores = scores * batch.token_weights.cpu()
        return batch.of_pairs(sum_per_sequence(scores, batch.bounds))
