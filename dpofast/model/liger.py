"""Liger's layers in place of a model's own, on a GPU and inside `micro_batch` only.

transformers' integration patches a model and the Python module of its family for good, so that a
model made later in the process would have Liger's layers, too, and none could run on a CPU any
more. Here the patch is taken off again at once, and put on for each micro-batch.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.liger import apply_liger_kernel

from dpofast.errors import ConfigError, one_line
from dpofast.model.parts import causal_lm
from dpofast.model.replace import Replacement, replaced_forwards, replaced_functions
from dpofast.options.liger import DEVICE_TYPES, KINDS_OPTION, OPTION

logger = logging.getLogger(__name__)

FAMILIES = "transformers.models."  # Python modules that Liger knows begin like this
METHODS = ("forward", "extra_repr", "_get_name")  # that Liger sets on a layer
ROPE = "apply_rotary_pos_emb"
# Activations that Liger's layers have built in, whatever the config names.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "GEGLU": partial(F.gelu, approximate="tanh"),
    "SwiGLU": F.silu,
    "Experts": F.silu,
    "ReLUSquared": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class LigerLayers:
    """What Liger has for a model.

    Attributes:
        forwards: layers, each with Liger's forward.
        functions: Python modules, each with Liger's functions by the name of the family's own.
        names: Liger's names of all of these, sorted.
    """

    forwards: tuple[Replacement, ...]
    functions: Mapping[ModuleType, Mapping[str, Callable[..., Any]]]
    names: tuple[str, ...]


# By the causal LM, so that nothing of this is saved or copied with the model.
_LAYERS: WeakKeyDictionary[nn.Module, LigerLayers] = WeakKeyDictionary()


def use_liger(model: nn.Module, kinds: Mapping[str, bool] | None) -> None:
    """Give a model Liger's layers for its micro-batches, or take them away.

    Args:
        model: causal LM or PeftModel.
        kinds: arguments of Liger's patch; None for the model's own layers.

    Raises:
        ConfigError: Liger can't patch this model as it is asked to.
    """
    lm = causal_lm(model)
    _LAYERS.pop(lm, None)
    if kinds is None:
        return
    layers = _layers_of(lm, kinds)
    if not layers.names:
        logger.warning("%s: Liger has no layers for %s; its own run.", OPTION, type(lm).__name__)
        return
    logger.info("Liger's layers: %s.", ", ".join(layers.names))
    _LAYERS[lm] = layers


@contextlib.contextmanager
def liger_layers(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the `with` block, a model on a GPU runs the layers that `use_liger` gave it.

    `micro_batch` enters this. The backward belongs inside the block, too, because gradient
    checkpointing runs the layers again.

    Args:
        model: causal LM or PeftModel.
        device: device of the micro-batch.
    """
    layers = _LAYERS.get(causal_lm(model))
    if layers is None or device.type not in DEVICE_TYPES:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced_forwards(layers.forwards))
        for home, functions in layers.functions.items():
            stack.enter_context(replaced_functions(home, functions))
        yield


@contextlib.contextmanager
def own_layers(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, a model's micro-batches run its own layers."""
    lm = causal_lm(model)
    layers = _LAYERS.pop(lm, None)
    try:
        yield
    finally:
        if layers is not None:
            _LAYERS[lm] = layers


def has_liger(model: nn.Module, device: torch.device) -> bool:
    """Whether a model's micro-batches run Liger's layers on a device."""
    return causal_lm(model) in _LAYERS and device.type in DEVICE_TYPES


def runs_liger(model: nn.Module) -> bool:
    """Whether micro-batches run Liger's layers where the model is now."""
    return has_liger(model, next(model.parameters()).device)


def liger_names(model: nn.Module) -> list[str]:
    """The names of all Liger layers that a model scores with, for the reference's identity.

    Those that a script has patched in by itself count, too.
    """
    lm = causal_lm(model)
    layers = _LAYERS.get(lm)
    names = set(() if layers is None else layers.names)
    functions = [getattr(each.forward, "__func__", None) for each in lm.modules()]
    functions += [vars(home).get(ROPE) for home in _homes(lm)]
    return sorted(names | {_name(each) for each in functions if _is_ligers(each)})


def _layers_of(lm: Any, kinds: Mapping[str, bool]) -> LigerLayers:
    """Patch a model, note what has changed, and take the patch off again."""
    homes = {home: dict(vars(home)) for home in _homes(lm)}
    methods = {module: _methods(module) for module in lm.modules()}
    children = {module: dict(module._modules) for module in methods}
    try:
        apply_liger_kernel(lm, dict(kinds))
        forwards = [
            (module, _function(module.forward))
            for module, before in methods.items()
            if module.__dict__.get("forward") is not before.get("forward")
        ]
        # An activation is a module of its own, which Liger replaces as a whole.
        forwards += [
            (child, type(module._modules[name]).forward)
            for module, before in children.items()
            for name, child in before.items()
            if child is not None and module._modules[name] is not child
        ]
        functions = {
            home: {
                name: _guarded(before[name], value) if name == ROPE else value
                for name, value in vars(home).items()
                if isinstance(value, FunctionType) and before.get(name, value) is not value
            }
            for home, before in homes.items()
        }
    except (NotImplementedError, ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{OPTION}: Liger can't patch {type(lm).__name__} ({one_line(error)}); leave it out, "
            f"or name the kinds of layers in {KINDS_OPTION}."
        ) from error
    finally:
        for home, before in homes.items():
            vars(home).update(before)
        for module, before in methods.items():
            for name in METHODS:
                module.__dict__.pop(name, None)
            module.__dict__.update(before)
            module._modules.update(children[module])
    fitting = [each for each in forwards if _has_its_activation(*each)]
    if len(fitting) < len(forwards):
        logger.warning(
            "%s: some layers have another activation than Liger's; their own run.", OPTION
        )
    found = {_name(function) for _, function in fitting}
    found |= {_name(each) for changed in functions.values() for each in changed.values()}
    return LigerLayers(tuple(fitting), functions, tuple(sorted(found)))


def _methods(module: nn.Module) -> dict[str, Any]:
    return {name: module.__dict__[name] for name in METHODS if name in module.__dict__}


def _function(method: Any) -> Callable[..., Any]:
    return method.__func__ if isinstance(method, MethodType) else method


def _homes(lm: nn.Module) -> set[ModuleType]:
    """The Python modules of transformers in which a model's layers look their functions up."""
    names = {type(module).__module__ for module in lm.modules()}
    return {sys.modules[name] for name in names if name.startswith(FAMILIES)}


def _name(function: Any) -> str:
    """Liger's name of a layer, by its forward, or of a function."""
    function = getattr(function, "liger", function)
    return str(function.__qualname__).removesuffix(".forward")


def _is_ligers(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("liger_kernel")


def _guarded(own: Callable[..., Any], liger: Callable[..., Any]) -> Callable[..., Any]:
    """Liger's RoPE, where a call is as its kernel expects it, and otherwise the family's own.

    The kernel reads one row of cosines for each token: the first row of the batch for all of them,
    or a row of its own for each. A packed row has one, by the positions of its tokens.
    """

    def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **more: Any) -> Any:
        batch, _, length, _ = query.shape
        is_usual = not args and not more and cos.dim() == 3
        fits = is_usual and cos.shape[0] in (1, batch) and cos.shape[1] == length
        return (liger if fits else own)(query, key, cos, sin, *args, **more)

    rope.liger = liger  # type: ignore[attr-defined]  # for its name
    return rope


def _has_its_activation(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a layer's activation is the one that Liger's layer has built in."""
    name = _name(forward)
    own = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    if "ReLUSquared" in name:  # the layer is an activation itself
        own = module
    expected = next((ACTIVATIONS[kind] for kind in ACTIVATIONS if kind in name), None)
    if own is None or expected is None:
        return True
    x = torch.linspace(-3, 3, 7)
    return torch.allclose(own(x), expected(x), atol=1e-6)
