"""The head of a transformers causal LM: what it does to hidden states, and where our op takes over.

The op runs inside the head module's own forward. So ZeRO-3's hooks gather the weight around it, and
DDP and PEFT see an ordinary forward.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpofast.errors import ModelError
from dpofast.reference.identity.options import (
    LOGIT_DIVISORS,
    LOGIT_MULTIPLIERS,
    SOFTCAP_OPTIONS,
)
from dpofast_kernels import HeadOptions, linear_logps, linear_pair_loss, linear_scores


class HeadTask(Protocol):
    """What the head is to do with the scored hidden states.

    It gives a tensor or a tuple of them: inside any other object DeepSpeed would not see them, and
    ZeRO-3 would not gather the weight for the backward.
    """

    def __call__(
        self,
        hidden_states: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
    ) -> Any: ...


@dataclass(frozen=True)
class PairLossTask:
    """The loss of whole pairs; the tensors are those of `linear_pair_loss`."""

    labels: Tensor  # [N]
    bounds: Tensor  # [2P+1]
    ref_logps: Tensor  # [2P]
    loss: Any
    options: HeadOptions

    def __call__(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The fields of a PairLossOutput: summed loss [], logps [2P] and metrics [8, P]."""
        options = replace(self.options, bias=bias)
        output = linear_pair_loss(
            hidden_states, weight, self.labels, self.bounds, self.ref_logps, self.loss, options
        )
        return output.loss, output.logps, output.metrics


@dataclass(frozen=True)
class ScoreTask:
    """Log-probs of each label, [N] in nats; or [2, N], with the logits' log-sum-exps below them.

    With these there is no gradient.
    """

    labels: Tensor  # [N]
    options: HeadOptions
    with_logsumexps: bool = False

    def __call__(self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        op = linear_scores if self.with_logsumexps else linear_logps
        return op(hidden_states, weight, self.labels, replace(self.options, bias=bias))


def head_options(config: Any) -> HeadOptions:
    """What a model family does to its logits after the head, read from its config.

    Gemma caps them (`final_logit_softcapping`), as do RecurrentGemma and xLSTM under other names;
    Cohere multiplies (`logit_scale`), Falcon-H1 too (`lm_head_multiplier`); Granite divides
    (`logits_scaling`). What no name here covers is found by `dpofast.model.checks.check_head`.
    """
    config = config.get_text_config()
    softcap = next((cap for name in SOFTCAP_OPTIONS if (cap := getattr(config, name, None))), None)
    scale = math.prod(_number(config, name) for name in LOGIT_MULTIPLIERS)
    divisor = math.prod(_number(config, name) for name in LOGIT_DIVISORS)
    return HeadOptions(softcap=softcap, logit_scale=scale / divisor)


def _number(config: Any, name: str) -> float:
    value = getattr(config, name, None)
    return 1.0 if value is None else float(value)


def head_forwards(head: Any) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Which modules' forward becomes the op, and that forward: (module, forward) pairs.

    Args:
        head: what `get_output_embeddings()` returns.

    Raises:
        ModelError: a head that is neither a plain Linear, nor LoRA or modules_to_save around one.
    """
    if type(head) is nn.Linear:
        return [(head, _linear_forward)]
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        # PEFT's wrapper calls the copy that it trains, or the original with adapters off.
        inner = [head.original_module, *head.modules_to_save.values()]
        return [pair for module in inner for pair in head_forwards(module)]
    if _is_plain_lora(head):
        return [(head, _lora_forward)]
    raise ModelError(
        f"The model's head is a {type(head).__module__}.{type(head).__name__}, but the loss is "
        "computed inside the head and needs its weight: keep the head a plain torch.nn.Linear, "
        "in `modules_to_save`, or under LoRA without DoRA, bias or dropout, and not quantised."
    )


def bind(module: nn.Module, function: Callable[..., Any]) -> None:
    """Give one module a forward of its own, until the attribute is deleted."""
    module.forward = types.MethodType(function, module)


def _linear_forward(head: nn.Linear, hidden_states: Tensor, task: HeadTask) -> Any:
    return task(hidden_states, head.weight, head.bias)


def _is_plain_lora(head: Any) -> bool:
    """LoRA whose forward is x W^T + s (x A^T) B^T and nothing else."""
    if not (hasattr(head, "lora_A") and type(getattr(head, "base_layer", None)) is nn.Linear):
        return False
    return not (
        head.lora_variant  # DoRA and its kin
        or any(head.lora_bias.values())
        or any(getattr(dropout, "p", 0.0) for dropout in head.lora_dropout.values())
    )


def _lora_forward(head: Any, hidden_states: Tensor, task: HeadTask) -> Any:
    """x W^T + s (x A^T) B^T as one product: [x, s x A^T] against [W, B].

    The sum W + s B A would be rounded to the weight's dtype, where most of a small adapter is lost.
    """
    weight = head.base_layer.weight  # [V, H]
    inputs, weights = [hidden_states], [weight]
    if not (head.disable_adapters or head.merged):
        for name in head.active_adapters:
            if name in head.lora_A:
                low_rank = head.lora_A[name](hidden_states.to(head.lora_A[name].weight.dtype))
                inputs.append((low_rank * head.scaling[name]).to(hidden_states.dtype))  # [N, r]
                weights.append(head.lora_B[name].weight.to(weight.dtype))  # [V, r]
    return task(torch.cat(inputs, 1), torch.cat(weights, 1), head.base_layer.bias)
