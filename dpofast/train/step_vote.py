"""What the ranks tell each other in every step: whether a number isn't finite, or a signal came.

Ranks that save or stop at different steps would wait for each other for ever, so they must agree.
One small sum over the ranks, after the backward pass, serves all questions. Its result is the only
value of a step that the host waits for.
"""

from __future__ import annotations

import signal
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from dpofast.options.config import DPOConfig


class VotesOnSteps(Trainer):
    """Makes the ranks agree, before each optimizer step, on whether the run goes on.

    Attributes:
        step_loss: this rank's part of the step's loss, [] on its device, set by `training_step`.
        received_signal: a signal that this rank has received and that stops the run; None so far.
        stopping_signal: the signal that stops the run after this step, the same on all ranks; None
            so far.
    """

    args: DPOConfig
    step_loss: Tensor | None = None
    received_signal: signal.Signals | None = None
    stopping_signal: signal.Signals | None = None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._vote(norm)
        return norm

    def _vote(self, norm: Any) -> None:
        device = self.args.device
        is_bad = torch.zeros((), dtype=torch.bool, device=device)
        if self.step_loss is not None:
            is_bad = ~torch.isfinite(self.step_loss)
        if norm is not None and not self._skips_overflows():
            is_bad = is_bad | ~torch.isfinite(torch.as_tensor(norm, device=device))
        own = 0 if self.received_signal is None else int(self.received_signal)
        votes = torch.stack([is_bad.double(), torch.tensor(own, dtype=torch.float64).to(device)])
        rows = self.accelerator.gather(votes.unsqueeze(0))  # [R, 2]
        bad, signals = (column.tolist() for column in rows.cpu().T)
        if any(bad):
            self.refuse_non_finite(norm, [rank for rank, value in enumerate(bad) if value])
        if any(signals):
            self.stopping_signal = signal.Signals(int(max(signals)))

    def _skips_overflows(self) -> bool:
        """Whether a loss scaler skips the steps whose gradient isn't finite, as it should."""
        return bool(self.args.fp16)

    def refuse_non_finite(self, norm: Any, ranks: list[int]) -> None:
        """Stop the run, as the loss or the gradient norm of a step isn't finite.

        Args:
            norm: gradient norm of the step before clipping; None if it isn't known.
            ranks: the ranks on which one of them isn't finite.
        """
