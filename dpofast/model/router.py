"""The auxiliary loss of a mixture of experts, which keeps its routers from preferring few experts.

transformers computes it from the router logits of a micro-batch, and a coefficient scales it. A
token of a packed row counts once for every sequence that it belongs to. The loss therefore equals
that of the same sequences in padded rows.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.data.packing.padded_rows import collate_padded
from dpofast.errors import ConfigError
from dpofast.model.attention import any_dtype_attention
from dpofast.model.checks import HEAD_TOLERANCE, sample_sequences
from dpofast.model.forward import evaluating, micro_batch, run_batch
from dpofast.model.liger import own_layers
from dpofast.model.parts import causal_lm
from dpofast.model.rope import rope_of_each_row
from dpofast.options.config import DPOConfig
from dpofast_kernels import PairLossOutput

logger = logging.getLogger(__name__)

OPTION = "router_aux_loss_coef"
METRIC = "aux_loss"  # TRL logs the auxiliary loss under this name


@dataclass(frozen=True)
class RouterLoss:
    """Computes the auxiliary loss of a micro-batch; the body task of `run_batch`.

    It is not a sum over tokens: the loss of one large micro-batch differs from the mean over its
    parts.

    Attributes:
        coefficient: factor of the auxiliary loss in the loss that is trained.
        balance: transformers' function (router logits, num_experts, experts_per_token, weights of
            the tokens) -> [].
        num_experts: experts that each router chooses from.
        experts_per_token: experts that each router chooses for a token.
    """

    coefficient: float
    balance: Callable[..., Tensor]
    num_experts: int
    experts_per_token: int

    def __call__(self, outputs: Any, uses: Tensor) -> Tensor:
        """Returns the auxiliary loss [], without its coefficient.

        Args:
            outputs: outputs of the body, with the router logits.
            uses: [B, L] int64, sequences that each position belongs to; 0 on padding.
        """
        logits = outputs.router_logits  # one [B*L, experts] per layer that has a router
        return self.balance(logits, self.num_experts, self.experts_per_token, uses)


def make_router_loss(model: nn.Module, config: DPOConfig) -> RouterLoss | None:
    """The auxiliary loss that TRL would add for this model.

    Args:
        model: the policy.
        config: its router_aux_loss_coef replaces the coefficient in the model's own config.

    Returns:
        The loss, or None if the coefficient is 0 or transformers computes none for this model.

    Raises:
        ConfigError: there is a coefficient, but the loss can't be computed for this model.
    """
    lm = causal_lm(model)
    text_config = lm.config.get_text_config()
    is_mixture = hasattr(text_config, "output_router_logits")
    wanted = config.router_aux_loss_coef
    coefficient = getattr(text_config, OPTION, 0.0) if wanted is None else wanted
    if not coefficient or (wanted is None and not is_mixture):
        return None
    if not is_mixture:
        raise ConfigError(
            f"{OPTION}: got {wanted}, but {type(lm).__name__} has no routers whose logits it "
            "could give; leave it out."
        )
    # transformers repeats this function in the module of every family.
    balance = getattr(sys.modules[type(lm).__module__], "load_balancing_loss_func", None)
    if wanted is None and (balance is None or not _records_router_logits(lm)):
        logger.info("Routers: no auxiliary loss, as %s computes none.", type(lm).__name__)
        return None
    if _is_reentrant(config, model):
        raise ConfigError(
            "gradient_checkpointing_kwargs: with use_reentrant the auxiliary loss of the routers "
            f"would have no gradient; set use_reentrant to false, or {OPTION} to 0."
        )
    experts, chosen = (getattr(lm, name, None) for name in ("num_experts", "num_experts_per_tok"))
    if balance is None or experts is None or chosen is None:
        raise _unknown(lm, "lacks transformers' load_balancing_loss_func, or the sizes for it")
    return RouterLoss(coefficient, balance, experts, chosen)


def check_router_loss(router_loss: RouterLoss, model: nn.Module) -> None:
    """Compares the auxiliary loss of some padded sequences with the model's own.

    Raises:
        ConfigError: the losses differ, or the model doesn't compute one.
    """
    lm = causal_lm(model)
    batch = collate_padded(sample_sequences(model)).to(next(lm.parameters()).device)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.uses}
    # Liger's layers round in other places, so that single tokens can get other experts.
    with evaluating(lm), own_layers(lm), any_dtype_attention(lm.config):
        with rope_of_each_row(lm, batch):
            stock = lm(**inputs, use_cache=False, output_router_logits=True)
        expected = getattr(stock, METRIC, None)
        if not isinstance(expected, Tensor) or not getattr(stock, "router_logits", None):
            raise _unknown(lm, "gives none when asked for its router logits")
        with micro_batch(model, batch):
            _, ours = run_batch(lm, batch, _skip_head, router_loss)
    error = ((ours - expected).abs() / expected.abs()).item()
    # float32 whatever the model's dtype, as transformers sums the loss in float32.
    if not error <= HEAD_TOLERANCE[torch.float32]:  # NaN is an error, too
        raise _unknown(lm, f"computes it in another way (by {error:.1%})")


def add_router_loss(
    results: tuple[Any, ...], router_loss: RouterLoss | None, num_pairs: int
) -> tuple[PairLossOutput, dict[str, Tensor]]:
    """Adds the auxiliary loss of a micro-batch to the loss of its pairs.

    The auxiliary loss is multiplied by the number of pairs, because the trainer divides the summed
    loss by that number later. A step with one micro-batch then has the same loss as in TRL, and a
    micro-batch without pairs adds nothing.

    Args:
        results: results of `run_batch` with a PairLossTask and `router_loss`.
        router_loss: the auxiliary loss; None adds nothing.
        num_pairs: pairs of the micro-batch.

    Returns:
        The pairs' output with the whole loss, a sum over pairs; and the metrics to log for the
        auxiliary loss, also sums over pairs, by their names.
    """
    if router_loss is None:
        return PairLossOutput(*results), {}
    *of_pairs, aux_loss = results
    output = PairLossOutput(*of_pairs)
    total = output.loss + num_pairs * router_loss.coefficient * aux_loss
    return replace(output, loss=total), {METRIC: num_pairs * aux_loss}


def _skip_head(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    return (hidden_states,)  # a tuple, to which `run_batch` appends the auxiliary loss


def _records_router_logits(lm: Any) -> bool:
    """Whether a model has modules from which transformers takes its router logits.

    A dense model of a family that can also be a mixture has none.
    """
    recorded = getattr(lm.base_model, "_can_record_outputs", None) or {}
    recorders = recorded.get("router_logits", [])
    recorders = recorders if isinstance(recorders, list) else [recorders]
    sources: list[tuple[Any, str]] = [
        (getattr(each, "target_class", each), getattr(each, "layer_name", None) or "")
        for each in recorders
    ]
    # Families that don't name such modules hand their router logits on by themselves.
    return not sources or any(
        isinstance(module, kind) and part in name
        for name, module in lm.named_modules()
        for kind, part in sources
    )


def _is_reentrant(config: DPOConfig, model: nn.Module) -> bool:
    """Whether checkpointed layers run their forward without gradients.

    Reentrant checkpointing does, so the router logits inside these layers have no gradient.
    """
    if config.gradient_checkpointing:
        # transformers uses these two arguments itself. Without further arguments it sets
        # use_reentrant to False. With further ones it doesn't, and PyTorch's default is True.
        own = ("every_n_layers", "offload")
        given = config.gradient_checkpointing_kwargs or {}
        kwargs = {name: value for name, value in given.items() if name not in own}
        return bool(kwargs) and bool(kwargs.get("use_reentrant", True))
    # The model may have been given checkpointing before it came to the trainer.
    functions = (
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    )
    keywords: list[dict[str, Any]] = [getattr(function, "keywords", {}) for function in functions]
    return any(keyword.get("use_reentrant", True) for keyword in keywords)


def _unknown(lm: nn.Module, reason: str) -> ConfigError:
    return ConfigError(
        f"{OPTION}: the auxiliary loss of {type(lm).__name__}'s routers can't be added, as it "
        f"{reason}; set it to 0 to train without, and please report this model type."
    )
