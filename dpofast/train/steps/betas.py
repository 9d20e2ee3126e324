"""The beta of each step of a run: by a schedule, or by a controller that looks at the KL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dpofast.options.beta_fields import CONSTANT, beta_bounds
from dpofast.options.config import DPOConfig

# Errors of target_kl beyond this share count as this share.
LARGEST_ERROR = 0.2


@dataclass(frozen=True)
class BetaSchedule:
    """Beta over the steps of a run, from `start` in the first to `end` in the last.

    Attributes:
        kind: linear or cosine.
        start, end: beta of the first and of the last step, exactly.
        num_steps: optimizer steps of the whole run.
    """

    kind: str
    start: float
    end: float
    num_steps: int

    def of_step(self, index: int) -> float:
        """Beta of a step, counted from 0; beyond the last step it is `end`.

        With f = index / (num_steps - 1), beta is w start + (1 - w) end, where w is 1 - f for linear
        and (1 + cos(pi f)) / 2 for cosine. A run of a single step has `start`.
        """
        if self.num_steps < 2:
            return self.start
        share = min(index / (self.num_steps - 1), 1.0)
        weight = 1.0 - share if self.kind == "linear" else (1.0 + math.cos(math.pi * share)) / 2.0
        return weight * self.start + (1.0 - weight) * self.end


class KLController:
    """Moves beta after each step, so that the drift stays near a target.

    After a step with the drift d, beta is multiplied by 1 + gain e, where e = (d - target) / target
    is clipped to +-0.2. More drift than the target therefore raises beta.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2, where the gain is 0.1.

    Args:
        target: nats per token, above 0.
        gain: above 0 and at most 1.
        start: beta of the first step.
        bounds: smallest and largest beta.
    """

    def __init__(
        self, target: float, gain: float, start: float, bounds: tuple[float, float]
    ) -> None:
        self.target, self.gain, self.start, self.bounds = target, gain, start, bounds
        self._num_steps = 0  # measured so far
        self._last = self._next = start  # beta of the last step that was measured, and after it

    def of_step(self, index: int) -> float:
        """Beta of a step, counted from 0; the last one that was measured, or the next one."""
        return self._last if index < self._num_steps else self._next

    def update(self, index: int, drift: float) -> None:
        """Choose beta for the next step.

        Args:
            index: the step that was measured, counted from 0.
            drift: nats per token over all its pairs. NaN, at which a loss scaler may leave a step
                out, leaves beta as it is.
        """
        self._last, self._num_steps = self.of_step(index), index + 1
        self._next = self._last
        if math.isnan(drift):
            return
        error = (drift - self.target) / self.target
        error = min(max(error, -LARGEST_ERROR), LARGEST_ERROR)
        self._next = self._bounded(self._last * (1.0 + self.gain * error))

    def recorded(self) -> dict[str, Any]:
        """What `restore` needs, as JSON types."""
        return {
            "start": self.start,
            "num_steps": self._num_steps,
            "last": self._last,
            "next": self._next,
        }

    def restore(self, recorded: dict[str, Any]) -> None:
        """Go on from what `recorded` returned, bit for bit.

        If the user has let beta change, the controller begins again with the new one.
        """
        self._num_steps = recorded["num_steps"]
        if recorded["start"] == self.start:
            self._last, self._next = recorded["last"], self._bounded(recorded["next"])

    def _bounded(self, beta: float) -> float:
        return min(max(beta, self.bounds[0]), self.bounds[1])


def make_betas(config: DPOConfig, num_steps: int) -> BetaSchedule | KLController | None:
    """What moves beta as the options say; None if it is constant.

    Args:
        config: options of the run.
        num_steps: optimizer steps of the whole run.
    """
    if config.target_kl is not None:
        bounds = beta_bounds(config)
        return KLController(config.target_kl, config.target_kl_gain, config.beta, bounds)
    if config.beta_schedule == CONSTANT:
        return None
    assert config.beta_end is not None
    return BetaSchedule(config.beta_schedule, config.beta, config.beta_end, num_steps)
