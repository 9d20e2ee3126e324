"""Metrics that a user gives as a function of log-probs, logged in training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from dpofast.data.packing.batch import PackedPairs
from dpofast.errors import ConfigError, one_line
from dpofast.model.router import METRIC
from dpofast.monitor.kl import DRIFT, KL
from dpofast.options.metric_fields import TOKEN_METRICS
from dpofast_kernels import METRIC_NAMES, PairLossOutput

MEASURED = ("loss", *METRIC_NAMES, KL, DRIFT)
SPEEDS = ("runtime", "samples_per_second", "steps_per_second")
# What else a log of training or evaluation contains.
LOGGED = (
    *("epoch", "step", "learning_rate", "beta", "grad_norm", "num_tokens"),
    *("total_flos", "train_loss"),
    *("pairs_per_second", "tokens_per_second", "mfu", "num_input_tokens_seen"),
    *("lengths/pair", "lengths/scored", "lengths/row", "model_preparation_time"),
)
NLL = "nll_loss"  # the likelihood terms of the loss, under TRL's name
TAKEN = frozenset((*MEASURED, *TOKEN_METRICS, METRIC, NLL, *SPEEDS, *LOGGED))
PAIRS_TRIED = 16


@dataclass(frozen=True)
class PairOutputs:
    """What a `metrics_fn` gets of P pairs, on the device of the model and without gradients.

    Attributes:
        chosen_logps: [P] fp64, summed log-probs of the chosen answers under the policy, in nats.
        rejected_logps: [P] fp64, the same of the rejected answers.
        ref_chosen_logps: [P] fp64, summed log-probs of the chosen answers under the reference.
        ref_rejected_logps: [P] fp64, the same of the rejected answers.
        lengths: [P, 2] int64, scored tokens of the chosen and the rejected answers.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    lengths: Tensor


MetricsFunction = Callable[[PairOutputs], dict[str, Tensor]]


class OwnMetrics:
    """A user's metrics; they are tried on random pairs first, which also tells their names.

    Args:
        function: gets the outputs of P pairs, and returns [P] values for each name. The names are
            the same in every call. It is never called without pairs.
        device: device to try it on.

    Attributes:
        names: names of the metrics.

    Raises:
        ConfigError: the function fails, returns anything else, or uses a name that is taken.
    """

    def __init__(self, function: MetricsFunction, device: torch.device) -> None:
        if not callable(function):
            raise ConfigError(f"metrics_fn: got {function!r}, expected a function.")
        self.function = function
        generator = torch.Generator().manual_seed(0)
        logps = -50.0 + 9.0 * torch.randn(4, PAIRS_TRIED, generator=generator, dtype=torch.float64)
        lengths = torch.arange(1, 2 * PAIRS_TRIED + 1).view(-1, 2)
        tried = (*logps.to(device), lengths.to(device))
        values = self._try(tried)
        for pair in range(PAIRS_TRIED):
            alone = self._try(tuple(tensor[pair : pair + 1] for tensor in tried))
            _check_same(alone, {name: value[pair : pair + 1] for name, value in values.items()})
        self.names: tuple[str, ...] = tuple(values)
        taken = [name for name in values if name in TAKEN or name.startswith("eval_")]
        if taken:
            raise ConfigError(
                f"metrics_fn: the names {', '.join(taken)} are taken or reserved; choose others."
            )

    def _try(self, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        num_pairs = len(outputs[0])
        try:
            values = self.function(PairOutputs(*(each.clone() for each in outputs)))
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ConfigError(f"metrics_fn: it failed for {num_pairs} pairs ({reason}).") from error
        _check_values(values, num_pairs)
        return values

    def __call__(self, output: PairLossOutput, batch: PackedPairs) -> dict[str, Tensor]:
        """The metrics of a micro-batch's pairs: [P] for each name.

        Args:
            output: output of the batch's forward pass.
            batch: the micro-batch, with its reference log-probs.

        Raises:
            ConfigError: the function's names or shapes have changed.
        """
        assert batch.ref_logps is not None
        if not batch.num_pairs:  # the ranks add up the same names, even without pairs
            return dict.fromkeys(self.names, output.logps)
        logps, ref_logps = output.logps.detach(), batch.ref_logps.to(output.logps)  # [2P]
        lengths = batch.lengths.to(logps.device, non_blocking=True)
        columns = (logps[0::2], logps[1::2], ref_logps[0::2], ref_logps[1::2], lengths)
        with torch.no_grad():
            # Copies: the function may work in place, and the values are needed after it.
            values = self.function(PairOutputs(*(each.clone() for each in columns)))
        _check_values(values, batch.num_pairs)
        if set(values) != set(self.names):
            raise ConfigError(
                f"metrics_fn: it returned {_listed(values)}, but {_listed(self.names)} at the "
                "start; the names must be the same for all pairs."
            )
        return values


def _check_same(alone: dict[str, Tensor], together: dict[str, Tensor]) -> None:
    for name, value in together.items():
        same = name in alone and torch.allclose(
            alone[name].double(), value.double(), 1e-9, 1e-12, equal_nan=True
        )
        if not same:
            raise ConfigError(
                f"metrics_fn: {name!r} of a pair depends on the other pairs that it is called "
                "with, which are those of a micro-batch: return a value of each pair."
            )


def _check_values(values: object, num_pairs: int) -> None:
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(
            f"metrics_fn: it returned a {type(values).__name__}, expected a dict of names and "
            "tensors [P]."
        )
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.shape != (num_pairs,) or value.is_complex():
            got = (
                f"{list(value.shape)} {value.dtype}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise ConfigError(
                f"metrics_fn: {name!r} is {got} for {num_pairs} pairs, expected a tensor "
                f"[{num_pairs}] with one value per pair; means over pairs are taken later."
            )


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) or "nothing"
