"""The auxiliary loss of a mixture of experts, which keeps its routers from preferring few experts.

It is transformers' own function of a micro-batch's router logits, times a coefficient. A token of a
packed row weighs as many times as there are sequences that it belongs to, so the loss is that of
the same sequences in padded rows of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.data.packing.padded_rows import collate_padded
from dpofast.errors import ConfigError
from dpofast.model.attention import any_dtype_attention
from dpofast.model.checks import HEAD_TOLERANCE, some_sequences
from dpofast.model.forward import evaluating, micro_batch, run_batch
from dpofast.model.parts import causal_lm
from dpofast.options.config import DPOConfig
from dpofast_kernels import PairLossOutput

OPTION = "router_aux_loss_coef"
METRIC = "aux_loss"  # as TRL names it


@dataclass(frozen=True)
class RouterLoss:
    """The auxiliary loss of micro-batches.

    It is no sum over tokens: that of two micro-batches together is another one than their mean.

    Attributes:
        coefficient: what it is multiplied with where it joins the pairs' losses.
        balance: transformers' own, of router logits, the next two, and weights: -> [].
        num_experts: of each router.
        experts_per_token: that each router chooses.
    """

    coefficient: float
    balance: Callable[..., Tensor]
    num_experts: int
    experts_per_token: int

    def __call__(self, outputs: Any, uses: Tensor) -> Tensor:
        """[], of the body's outputs and the uses [B, L] of its positions."""
        logits = outputs.router_logits  # of each layer that has a router, [B*L, experts]
        return self.balance(logits, self.num_experts, self.experts_per_token, uses)


def make_router_loss(model: nn.Module, config: DPOConfig) -> RouterLoss | None:
    """What TRL adds for a model: its config's coefficient, or router_aux_loss_coef in its place.

    Returns:
        None where the coefficient is 0, or the model has none.

    Raises:
        ConfigError: there is a coefficient, and what it would multiply can't be had.
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
    if _is_reentrant(config, model):
        raise ConfigError(
            "gradient_checkpointing_kwargs: with use_reentrant the auxiliary loss of the routers "
            f"would have no gradient; set use_reentrant to false, or {OPTION} to 0."
        )
    balance = getattr(sys.modules[type(lm).__module__], "load_balancing_loss_func", None)
    experts, chosen = (getattr(lm, name, None) for name in ("num_experts", "num_experts_per_tok"))
    if balance is None or experts is None or chosen is None:
        raise _unknown(lm, "lacks transformers' load_balancing_loss_func, or the sizes for it")
    return RouterLoss(coefficient, balance, experts, chosen)


def check_router_loss(router_loss: RouterLoss, model: nn.Module) -> None:
    """Compare the auxiliary loss of some padded sequences with the model's own.

    Raises:
        ConfigError: they differ, or the model gives none.
    """
    lm = causal_lm(model)
    batch = collate_padded(some_sequences(model)).to(next(lm.parameters()).device)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.uses}
    with evaluating(lm), any_dtype_attention(lm.config):
        stock = lm(**inputs, use_cache=False, output_router_logits=True)
        expected = getattr(stock, METRIC, None)
        if not isinstance(expected, Tensor) or not getattr(stock, "router_logits", None):
            raise _unknown(lm, "gives none when asked for its router logits")
        with micro_batch(model, batch):
            _, ours = run_batch(lm, batch, _nothing, router_loss)
    error = ((ours - expected).abs() / expected.abs()).item()
    if not error <= HEAD_TOLERANCE[torch.float32]:
        raise _unknown(lm, f"computes it in another way (by {error:.1%})")


def join(
    results: tuple[Tensor, ...], router_loss: RouterLoss | None, num_pairs: int
) -> tuple[PairLossOutput, dict[str, Tensor]]:
    """A micro-batch's loss with its routers' share, and what is logged of that.

    The auxiliary loss counts for as many pairs as there are: so the mean over the pairs of a step
    of one micro-batch is what TRL computes, and a micro-batch without pairs adds nothing.

    Args:
        results: of `run_batch`.
        router_loss: that it was called with.
        num_pairs: of the micro-batch.
    Returns:
        The loss, a sum over pairs, with log-probs and metrics; and sums over pairs by their names.
    """
    if router_loss is None:
        return PairLossOutput(*results), {}
    loss, logps, metrics, aux_loss = results
    total = loss + num_pairs * router_loss.coefficient * aux_loss
    return PairLossOutput(total, logps, metrics), {METRIC: num_pairs * aux_loss}


def _nothing(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    return (hidden_states,)


def _is_reentrant(config: DPOConfig, model: nn.Module) -> bool:
    """Whether checkpointed layers run without gradients first, so that their outputs have none."""
    if config.gradient_checkpointing:
        own = ("every_n_layers", "offload")  # transformers' own, where these alone are given
        given = config.gradient_checkpointing_kwargs or {}
        kwargs = {name: value for name, value in given.items() if name not in own}
        return bool(kwargs) and bool(kwargs.get("use_reentrant", True))  # PyTorch's default
    functions = (
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    )
    keywords: list[dict[str, Any]] = [getattr(function, "keywords", {}) for function in functions]
    return any(each.get("use_reentrant", True) for each in keywords)


def _unknown(lm: nn.Module, what: str) -> ConfigError:
    return ConfigError(
        f"{OPTION}: the auxiliary loss of {type(lm).__name__}'s routers can't be added, as it "
        f"{what}; set it to 0 to train without, and please report this model type."
    )
