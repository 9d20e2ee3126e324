"""Warns before training if the optimizer's updates are so small that the weights round them away.

A bfloat16 number has 8 significant bits. An update below about 1/512 of a weight is lost when the
sum is rounded, however many steps repeat it. Where an optimizer adds its updates to a float32 copy
of the weights, nothing is lost.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpofast.model.parts import numel
from dpofast.monitor.guard import ReportGuard

logger = logging.getLogger(__name__)

HALVES = (torch.bfloat16, torch.float16)
SAMPLED = 1024  # weights of each parameter, evenly spread
WARNED_ABOVE = 0.5  # share of the trained weights
# Optimizers whose updates are as large as the learning rate, or smaller, whatever the gradient's
# size. Those of the second kind scale the rate by themselves.
SIZE_OF_RATE = re.compile(r"adam|adafactor|adagrad|lion|rmsprop", re.IGNORECASE)
OTHER_SIZE = re.compile(r"dadapt|prodigy|lamb", re.IGNORECASE)
# Attributes and options of optimizers that keep what rounding would lose.
KEPT_BY = (
    "bf16_stochastic_round",  # torchao
    "stochastic_rounding",
    "kahan_sum",  # optimi
    "use_kahan_summation",  # AnyPrecisionAdamW
    "master_weights",  # apex
    "fp32_master_params",
)


def share_unmoved(weights: Tensor, update: float) -> float:
    """Share of weights that stay what they are when `update` is added, and when it is subtracted.

    Weights that are 0 are left out: the smallest update moves them, which says nothing about the
    size that they will have.

    Args:
        weights: floating-point tensor of any shape.
        update: size of the update, above 0.

    Returns:
        A number from 0 to 1; 0 if all weights are 0.
    """
    weights = weights[weights != 0]
    if not weights.numel():
        return 0.0
    wide = weights.double()
    up, down = ((wide + sign * update).to(weights.dtype) for sign in (1, -1))
    return ((up == weights) & (down == weights)).double().mean().item()


def largest_update(
    optimizer: Any, max_grad_norm: float, groups: Sequence[Any] | None = None
) -> float | None:
    """The size that no update of a weight is likely to exceed; None if it can't be told.

    Args:
        optimizer: a PyTorch optimizer, maybe wrapped by accelerate.
        max_grad_norm: norm that gradients are clipped to; 0 for no clipping.
        groups: parameter groups that are meant; None for all of the optimizer.

    Returns:
        None also for optimizers that keep what rounding would lose.
    """
    optimizer = _inner(optimizer)
    name, groups = type(optimizer).__name__, groups or optimizer.param_groups
    for key in KEPT_BY:
        values = [getattr(optimizer, key, False), *(group.get(key, False) for group in groups)]
        # optimi's default for kahan_sum is None, which means on for weights in half precision.
        if any(values) or (key == "kahan_sum" and None in values):
            return None
    # A scheduler sets `lr` to the rate of the first step, and keeps the largest beside it.
    rates = [group.get(key) for group in groups for key in ("lr", "initial_lr", "max_lr")]
    rate = max((float(each) for each in rates if each is not None), default=0.0)
    if SIZE_OF_RATE.search(name) and not OTHER_SIZE.search(name):
        # RMSprop's first updates are larger, because its mean of squares begins at 0.
        alpha = max(float(group.get("alpha") or 0.0) for group in groups)
        return rate / math.sqrt(1 - alpha) if "rmsprop" in name.lower() else rate
    if type(optimizer) is torch.optim.SGD and max_grad_norm:
        momentum = max(group["momentum"] for group in groups)
        return rate * max_grad_norm / (1 - momentum) if momentum < 1 else None
    return None


def trained_share_unmoved(parameters: Iterable[Tensor], update: float) -> float:
    """Share of all trained weights that an update would not move, estimated from samples.

    Args:
        parameters: trained parameters; of those that ZeRO-3 has spread, this rank's part is read.
        update: size of the update.
    """
    total, unmoved = 0, 0.0
    for parameter in parameters:
        total += numel(parameter)
        if parameter.dtype in HALVES:
            own = getattr(parameter, "ds_tensor", parameter).detach().flatten()
            sample = own[:: max(1, own.numel() // SAMPLED)]
            unmoved += numel(parameter) * share_unmoved(sample, update)
    return unmoved / total if total else 0.0


class VanishingUpdates(TrainerCallback):
    """Logs one warning when training begins, if most weights would round their updates away."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if optimizer is None or not args.should_log or keeps_masters(args):
            return
        with ReportGuard()("looking for updates that vanish"):
            groups = _inner(optimizer).param_groups
            # DeepSpeed empties the groups of its optimizer between the steps.
            if not any(group["params"] for group in groups):
                groups = [{**groups[0], "params": list(model.parameters())}]
            total, unmoved, updates = 0, 0.0, []
            for group in groups:
                trained = [p for p in group["params"] if p.requires_grad]
                size = sum(map(numel, trained))
                total += size
                update = largest_update(optimizer, args.max_grad_norm or 0.0, [group])
                if update and (share := trained_share_unmoved(trained, update)):
                    unmoved += share * size
                    updates.append(update)
            if total and unmoved / total > WARNED_ABOVE:
                _warn(groups, max(updates), unmoved / total)


def keeps_masters(args: Any) -> bool:
    """Whether DeepSpeed keeps float32 copies of the weights, which its optimizer updates."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None:
        return False
    config = plugin.deepspeed_config
    is_half = any(config.get(name, {}).get("enabled") is True for name in ("bf16", "fp16"))
    in_half = any(
        config.get(name, {}).get(f"{name}_master_weights_and_grads") for name in ("bf16", "fp16")
    )
    return is_half and not in_half


def _warn(groups: Sequence[Any], update: float, share: float) -> None:
    dtypes = {
        str(parameter.dtype).removeprefix("torch.")
        for group in groups
        for parameter in group["params"]
        if parameter.dtype in HALVES and parameter.requires_grad
    }
    logger.warning(
        "learning_rate: the updates will vanish for %.0f%% of the trained weights. They are %s, "
        "and adding %.2g, the largest update that is likely, rounds back to the same weight. "
        "Load the model in float32 (dtype: float32) with bf16: true, which computes in bfloat16 "
        "all the same; or train with DeepSpeed, which keeps float32 copies; or raise "
        "learning_rate.",
        *(100 * share, " and ".join(sorted(dtypes)), update),
    )


def _inner(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
