"""Everything that makes a training step random: dropouts, and the noise of routers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

# Attributes that set random factors on the input of a mixture of experts' routers. PhiMoE's
# `router_jitter_noise` isn't one of them: it is a threshold, which counts in eval mode as well.
ROUTER_NOISES = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
# Modules that draw random numbers in training mode at a rate which no attribute of theirs holds,
# and the names of the rates in their config; an empty tuple where they always draw. In eval mode
# each of them computes the same function without the noise, gradients included.
NOISY_IN_TRAINING: dict[str, tuple[str, ...]] = {
    "BltGlobalTransformer": ("dropout",),
    "BltLocalDecoder": ("dropout",),
    "BltLocalEncoder": ("dropout",),
    "FalconDecoderLayer": ("attention_dropout", "hidden_dropout"),
    "FalconFlashAttention2": ("attention_dropout",),
    "GPTJFlashAttention2": ("attn_pdrop",),
    "GPTNeoFlashAttention2": ("attention_dropout",),
    "PersimmonAttention": ("attention_dropout",),
    "PhimoeTopKRouter": (),  # draws the experts instead of taking the best ones
}
# Layers that are checkpointed, which needs training mode. They read only sizes and rates in their
# config, so they get a copy of it in which the rates are 0.
CHECKPOINTED = {"FalconDecoderLayer"}
MODE = "training"  # the name that `dropouts` gives to the noise of these modules
# The attribute that marks a module whose noise is off, or one that was found to be random.
QUIET, RANDOM = "dpofast_quiet", "dpofast_random"


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Finds every dropout above 0, and everything else that makes training mode random.

    Yields:
        (module, name of the attribute that holds the rate). The name is "training" for a module
        that has no such attribute, and whose noise ends only with its training mode.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            is_rate = (
                name == "p"
                if isinstance(module, nn.modules.dropout._DropoutNd)
                else ("drop" in name or name in ROUTER_NOISES)
            )
            if is_rate and isinstance(value, float) and value > 0.0:
                yield module, name
        if is_random(module) or (_has_own_noise(module) and not _is_quiet(module)):
            yield module, MODE


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0, LoRA's included, and switches off the noise of routers.

    The model's config keeps its values.
    """
    for module, name in list(dropouts(model)):
        if name == MODE:
            _quieten(module)
        else:
            setattr(module, name, 0.0)


def mark_random(module: nn.Module) -> None:
    """Marks a module that was found to be random; `dropouts` finds it from here on."""
    setattr(module, RANDOM, True)


def is_random(module: nn.Module) -> bool:
    """Whether a module was marked by `mark_random`."""
    return hasattr(module, RANDOM)


def describe_noise(module: nn.Module, name: str) -> str:
    """What `dropouts` has found, as the rest of a sentence."""
    kind = type(module).__name__
    return f"{kind} draws random numbers" if name == MODE else f"{kind} has a dropout above 0"


def _has_own_noise(module: nn.Module) -> bool:
    """Whether a module draws random numbers in training mode at a rate that isn't its attribute."""
    rates = NOISY_IN_TRAINING.get(type(module).__name__)
    if not rates:
        return rates is not None
    config = getattr(module, "config", None)
    return any((getattr(config, rate, 0.0) or 0.0) > 0.0 for rate in rates)


def _is_quiet(module: nn.Module) -> bool:
    return hasattr(module, QUIET)


def _quieten(module: nn.Module) -> None:
    """Makes a module run its forward in eval mode from here on; its children keep their modes.

    Hooks do it rather than `eval()`, because the Trainer calls `train()` before every step.
    """
    kind = type(module).__name__
    if kind in CHECKPOINTED:
        module.config = copy.copy(module.config)
        for rate in NOISY_IN_TRAINING[kind]:
            setattr(module.config, rate, 0.0)
    elif not _is_quiet(module):
        setattr(module, QUIET, True)
        module.register_forward_pre_hook(_leave_training)
        module.register_forward_hook(_enter_training, always_call=True)


def _leave_training(module: nn.Module, *_: Any) -> None:
    setattr(module, QUIET, module.training)
    module.training = False


def _enter_training(module: nn.Module, *_: Any) -> None:
    module.training = getattr(module, QUIET)
