"""Settings that scripts read from the trainer, as read-only attributes; most are TRL's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dpofast.errors import ConfigError
from dpofast.model.parts import is_peft_model
from dpofast.options.config import DPOConfig
from dpofast.options.named_loss import loss_names
from dpofast.train.own.metrics import MetricsFunction
from dpofast.train.steps.micro_batches import PairLossPass
from dpofast_kernels import (
    CoupledCustomLoss,
    CoupledFunction,
    CustomLoss,
    PairFunction,
    PreferenceLoss,
)


class Setting(property):
    """A property whose assignment is an error that says what to do instead of being ignored."""

    def __init__(self, read: Callable[[Any], Any], remedy: str) -> None:
        super().__init__(read, self._refuse)
        self.__doc__, self.name, self.remedy = read.__doc__, read.__name__, remedy

    def _refuse(self, trainer: Any, value: Any) -> None:
        own = getattr(trainer, self.name, self)
        # As of `trainer.beta = trainer.args.beta`; some lists are made anew at each reading.
        if own is value or (isinstance(own, list) and own == value):
            return
        raise ConfigError(
            f"{type(trainer).__qualname__}.{self.name} can't be assigned, as it would change "
            f"nothing: {self.remedy}."
        )


def _setting(remedy: str) -> Callable[[Callable[[Any], Any]], Setting]:
    return lambda read: Setting(read, remedy)


_LOSS = (
    "set it in DPOConfig, or assign trainer.pair_loss = dpofast_kernels.make_loss(...), or what "
    "make_mixture(...), make_coupled_loss(...) or DivergenceLoss(...) returns"
)
_CONFIG = "set it in DPOConfig"
_ARGUMENT = "pass it to DPOTrainer"


class ShowsSettings:
    """Adds these attributes to a trainer; each shows what the trainer uses."""

    args: Any
    model: Any
    pair_loss: PreferenceLoss
    _pair_loss_pass: PairLossPass
    _ref_model: nn.Module | None = None

    @_setting(_LOSS)
    def beta(self) -> float:
        """Beta of the loss; of a loss_fn, the factor of the rewards."""
        return self.pair_loss.beta

    @_setting(_LOSS)
    def label_smoothing(self) -> float:
        """Label smoothing of the loss."""
        return self.pair_loss.label_smoothing

    @_setting(_LOSS)
    def loss_types(self) -> list[str]:
        """The names of the losses that are summed; "custom" for a loss_fn."""
        return loss_names(self._config, self.pair_loss)

    @_setting(_LOSS)
    def loss_type(self) -> list[str]:
        """The same, under TRL's older name."""
        return loss_names(self._config, self.pair_loss)

    @_setting(_LOSS)
    def loss_weights(self) -> list[float]:
        """The weights of the losses that are summed."""
        if self.pair_loss == self._config.make_loss():
            return list(self._config.loss_weights or [1.0] * len(self._config.loss_type))
        loss = getattr(self.pair_loss, "loss", self.pair_loss)
        return list(getattr(loss, "weights", [1.0]))

    @_setting(_LOSS)
    def f_divergence_type(self) -> str:
        """What keeps the policy near the reference."""
        return str(getattr(self.pair_loss, "divergence", "reverse_kl"))

    @_setting(_LOSS)
    def f_alpha_divergence_coef(self) -> float:
        """The coefficient of alpha_divergence."""
        return float(getattr(self.pair_loss, "coefficient", 0.5))

    @_setting(_CONFIG)
    def ld_alpha(self) -> float | None:
        """Weight of the tokens by which an answer is the longer one; None for 1."""
        return self._config.ld_alpha

    @_setting(_CONFIG)
    def use_weighting(self) -> bool:
        """Whether pairs are weighted as in WPO."""
        return self._pair_loss_pass.weighting is not None

    @_setting(_ARGUMENT)
    def loss_fn(self) -> PairFunction | CoupledFunction | None:
        """The user's own loss; None for a loss of the options."""
        loss = self.pair_loss
        if isinstance(loss, CoupledCustomLoss):
            return CoupledFunction(loss.function)
        return loss.function if isinstance(loss, CustomLoss) else None

    @_setting(_ARGUMENT)
    def metrics_fn(self) -> MetricsFunction | None:
        """The user's own metrics."""
        own_metrics = self._pair_loss_pass.own_metrics
        return None if own_metrics is None else own_metrics.function

    @_setting(_ARGUMENT)
    def ref_model(self) -> nn.Module | None:
        """The reference model; None if the reference is the policy before step 1."""
        return self._ref_model

    @_setting("set router_aux_loss_coef in DPOConfig")
    def aux_loss_enabled(self) -> bool:
        """Whether the auxiliary loss of a mixture's routers is added."""
        return self._pair_loss_pass.router_loss is not None

    @_setting("set router_aux_loss_coef in DPOConfig")
    def aux_loss_coef(self) -> float:
        """Factor of the auxiliary loss of a mixture's routers; 0 without it."""
        router_loss = self._pair_loss_pass.router_loss
        return 0.0 if router_loss is None else router_loss.coefficient

    @_setting("set router_aux_loss_coef in DPOConfig")
    def router_aux_loss_coef(self) -> float:
        """The same, under TRL's present name."""
        return self.aux_loss_coef

    @_setting(_CONFIG)
    def max_length(self) -> int | None:
        """Most tokens of a prompt and one answer."""
        return self._config.max_length

    @_setting(_CONFIG)
    def max_prompt_length(self) -> int | None:
        """Most tokens of a prompt."""
        return self._config.max_prompt_length

    @_setting(_CONFIG)
    def max_completion_length(self) -> int | None:
        """Most tokens of an answer."""
        return self._config.max_completion_length

    @_setting(_CONFIG)
    def truncation_mode(self) -> str:
        """What is cut from longer sequences."""
        return self._config.truncation_mode

    @_setting(_CONFIG)
    def precompute_ref_log_probs(self) -> bool:
        """Whether the reference log-probs are kept for later runs."""
        return self._config.precompute_ref_log_probs

    @_setting(_CONFIG)
    def precompute_ref_logps(self) -> bool:
        """The same, under TRL's present name."""
        return self._config.precompute_ref_log_probs

    @_setting("pass a PeftModel, or a peft_config")
    def is_peft_model(self) -> bool:
        """Whether the policy is a PeftModel."""
        return is_peft_model(self.model)

    @property
    def _config(self) -> DPOConfig:
        config: DPOConfig = self.args
        return config
