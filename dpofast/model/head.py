"""The head of a transformers causal LM, whose forward becomes our op during a step.

The op runs inside the head module's own forward. ZeRO-3's hooks therefore gather the weight around
it, and DDP and PEFT see an ordinary forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpofast.errors import ModelError
from dpofast.model.replace import Replacement
from dpofast.reference.identity.options import (
    LOGIT_DIVISORS,
    LOGIT_MULTIPLIERS,
    MULTIPLY_BY_DIVISORS,
    SOFTCAP_OPTIONS,
)
from dpofast_kernels import (
    Answers,
    HeadOptions,
    PairExtras,
    UnpairedLoss,
    linear_logps,
    linear_pair_loss,
    linear_scores,
    linear_sequence_loss,
)

NO_EXTRAS = PairExtras()


class HeadTask(Protocol):
    """The computation that the head runs on the hidden states of the scored positions.

    Its result is a tensor, or a tuple of tensors and None. DeepSpeed would not see tensors inside
    any other object, and ZeRO-3 would then not gather the weight for the backward.
    """

    def __call__(
        self,
        hidden_states: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
    ) -> Any: ...


@dataclass(frozen=True)
class PairLossTask:
    """The head task of training and evaluation: the loss of whole pairs.

    Attributes:
        labels, bounds, ref_logps, loss: arguments of `linear_pair_loss` with these names.
        options: cap and scale of the family's logits; the bias comes from the head itself.
        extras: weights and confidences of the pairs, coefficients of sequences, weights of tokens,
            WPO's weights, and statistics of the rows.
    """

    labels: Tensor  # [N]
    bounds: Tensor  # [2P+1]
    ref_logps: Tensor  # [2P]
    loss: Any
    options: HeadOptions
    extras: PairExtras = NO_EXTRAS

    def __call__(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Returns the fields of a PairLossOutput, first loss [], logps [2P] and metrics [8, P]."""
        options = replace(self.options, bias=bias)
        output = linear_pair_loss(
            *(hidden_states, weight, self.labels, self.bounds, self.ref_logps, self.loss, options),
            extras=self.extras,
        )
        return tuple(getattr(output, item.name) for item in fields(output))


@dataclass(frozen=True)
class SequenceLossTask:
    """The head task of training and evaluation with a loss of single answers.

    Attributes:
        labels, answers, loss: arguments of `linear_sequence_loss` with these names.
        options: cap and scale of the family's logits; the bias comes from the head itself.
    """

    labels: Tensor  # [N]
    answers: Answers
    loss: UnpairedLoss
    options: HeadOptions

    def __call__(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the fields of a SequenceLossOutput: summed loss [], logps [S], metrics [2, S]."""
        options = replace(self.options, bias=bias)
        output = linear_sequence_loss(
            hidden_states, weight, self.labels, self.answers, self.loss, options
        )
        return output.loss, output.logps, output.metrics


@dataclass(frozen=True)
class ScoreTask:
    """The head task of scoring: the log-prob of each label.

    Attributes:
        labels: [N] int64.
        options: cap and scale of the family's logits; the bias comes from the head itself.
        with_logsumexps: also compute the log-sum-exps of the logits. The result then has no
            gradient.
    """

    labels: Tensor  # [N]
    options: HeadOptions
    with_logsumexps: bool = False

    def __call__(self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the log-probs [N] in nats, or [2, N]: log-probs, then log-sum-exps."""
        op = linear_scores if self.with_logsumexps else linear_logps
        return op(hidden_states, weight, self.labels, replace(self.options, bias=bias))


def head_options(config: Any, backend: str = "auto") -> HeadOptions:
    """Reads from a model's config what its family does to the logits after the head.

    Gemma caps them (`final_logit_softcapping`), and so do RecurrentGemma and xLSTM under other
    names. Cohere (`logit_scale`) and Falcon-H1 (`lm_head_multiplier`) multiply them. Granite
    divides them by `logits_scaling`, and HyperCLOVA X multiplies them by it.
    `dpofast.model.checks.check_head` finds the models that do anything else.

    Args:
        config: the model's config.
        backend: the head's back end, as in HeadOptions.
    """
    config = config.get_text_config()
    softcap = next((cap for name in SOFTCAP_OPTIONS if (cap := getattr(config, name, None))), None)
    scale = math.prod(_number(config, name) for name in LOGIT_MULTIPLIERS)
    divisor = math.prod(_number(config, name) for name in LOGIT_DIVISORS)
    if config.model_type in MULTIPLY_BY_DIVISORS:
        divisor = 1 / divisor
    return HeadOptions(softcap=softcap, logit_scale=scale / divisor, backend=backend)


def _number(config: Any, name: str) -> float:
    value = getattr(config, name, None)
    return 1.0 if value is None else float(value)


def head_forwards(head: Any) -> list[Replacement]:
    """Lists the modules whose forward becomes the op during a step, each with its new forward.

    Args:
        head: the result of the model's `get_output_embeddings()`.

    Returns:
        (module, forward) pairs, to be given to `replaced_forwards`.

    Raises:
        ModelError: the head is neither a plain Linear, nor LoRA or modules_to_save around one.
    """
    if type(head) is nn.Linear:
        return [(head, _linear_forward)]
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        # PEFT's wrapper calls the copy that it trains, or the original while adapters are off.
        inner = [head.original_module, *head.modules_to_save.values()]
        return [pair for module in inner for pair in head_forwards(module)]
    if _is_plain_lora(head):
        return [(head, _lora_forward)]
    raise ModelError(
        f"The model's head is a {type(head).__module__}.{type(head).__name__}, but the loss is "
        "computed inside the head and needs its weight: keep the head a plain torch.nn.Linear, "
        "in `modules_to_save`, or under LoRA without DoRA, bias or dropout, and not quantised."
    )


def _linear_forward(head: nn.Linear, hidden_states: Tensor, task: HeadTask) -> Any:
    return task(hidden_states, head.weight, head.bias)


def _is_plain_lora(head: Any) -> bool:
    """Whether this is LoRA whose forward is x W^T + s (x A^T) B^T and nothing else."""
    if not (hasattr(head, "lora_A") and type(getattr(head, "base_layer", None)) is nn.Linear):
        return False
    return not (
        head.lora_variant  # DoRA and similar
        or any(head.lora_bias.values())
        or any(getattr(dropout, "p", 0.0) for dropout in head.lora_dropout.values())
    )


def _lora_forward(head: Any, hidden_states: Tensor, task: HeadTask) -> Any:
    """Runs the task on x W^T + s (x A^T) B^T, written as one product: [x, s x A^T] [W, B]^T.

    The other way, one weight W + s B A, would lose most of a small adapter when the sum is rounded
    to the weight's dtype.
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
