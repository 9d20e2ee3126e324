"""The part of DPOTrainer that gives the loss of each step its beta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from dpofast.errors import ConfigError
from dpofast.monitor.kl import DRIFT
from dpofast.monitor.metrics import MetricSums
from dpofast.options.config import DPOConfig
from dpofast.train.steps.betas import BetaSchedule, KLController, make_betas
from dpofast_kernels import PreferenceLoss


class MovesBeta:
    """Makes beta move while a transformers Trainer trains; evaluations keep the beta of the loss.

    This class comes before Trainer among the bases of DPOTrainer.
    """

    user_args: Any
    args: DPOConfig
    state: TrainerState
    pair_loss: PreferenceLoss
    _betas: BetaSchedule | KLController | None = None
    _drift: Tensor | None = None  # [2] fp64: sum over this rank's answers of the step, and tokens

    def begin_betas(self, num_steps: int, recorded: dict[str, Any] | None = None) -> None:
        """Prepare the betas of the run that begins.

        Args:
            num_steps: optimizer steps of the whole run.
            recorded: what `recorded_beta` returned at the checkpoint from which it resumes.

        Raises:
            ConfigError: the loss was replaced by one with a beta of its own.
        """
        self._betas, self._drift = make_betas(self.user_args, num_steps), None
        if isinstance(self._betas, KLController) and recorded is not None:
            self._betas.restore(recorded)
        self.step_loss()

    def recorded_beta(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, as JSON types; None if beta follows from the step's number."""
        return self._betas.recorded() if isinstance(self._betas, KLController) else None

    def step_loss(self) -> PreferenceLoss:
        """The loss with the beta of the training step that is running, or comes next.

        Raises:
            ConfigError: the loss was replaced by one with a beta of its own.
        """
        if self._betas is None:
            return self.pair_loss
        if self.pair_loss.beta != self._betas.start:
            option = "target_kl" if isinstance(self._betas, KLController) else "beta_schedule"
            raise ConfigError(
                f"DPOTrainer.pair_loss: its beta is {self.pair_loss.beta}, but {option} moves beta "
                f"from {self._betas.start}: give pair_loss that beta, or leave {option} out."
            )
        return self.pair_loss.with_beta(self._betas.of_step(self.state.global_step))

    def logged_beta(self) -> dict[str, float]:
        """The beta of the last step, for a log that comes after it; {} if it is constant."""
        if self._betas is None:
            return {}
        return {"beta": self._betas.of_step(max(self.state.global_step - 1, 0))}

    # What target_kl measures

    def note_drift(self, sums: MetricSums) -> None:
        """Add what a micro-batch of the step has moved.

        Args:
            sums: the metrics of the micro-batch.
        """
        if isinstance(self._betas, KLController) and DRIFT in sums.totals:
            # Lengths, and so their sums, are on the host.
            both = torch.stack(
                [
                    each[DRIFT].to(self.args.device, non_blocking=True)
                    for each in (sums.totals, sums.counts)
                ]
            )  # [2]
            self._drift = both if self._drift is None else self._drift + both

    def step_sums(self) -> Tensor:
        """[k] fp64: what the ranks add up when they vote on a step; k is the same on all ranks."""
        drift, self._drift = self._drift, None
        size = 2 if isinstance(self._betas, KLController) else 0
        if drift is None:
            drift = torch.zeros(size, dtype=torch.float64, device=self.args.device)
        return drift

    def take_step_sums(self, totals: list[float]) -> None:
        """Choose the next step's beta.

        Args:
            totals: [k], `step_sums` over all ranks.

        Raises:
            ConfigError: nothing has measured the drift that target_kl needs.
        """
        if not isinstance(self._betas, KLController):
            return
        drift, tokens = totals
        if not tokens:  # every step has pairs, and every pair has tokens
            raise ConfigError(
                f"target_kl: no pass of step {self.state.global_step + 1} has measured the drift: "
                "let the overridden compute_loss, compute_pair_loss or training_step call that of "
                "super(), or leave target_kl out."
            )
        self._betas.update(self.state.global_step, drift / tokens)
