"""Runs a model that ZeRO-3 has sharded, by gathering the weights of one decoder block at a time.

DeepSpeed's engine does the same with hooks of its own. But an engine needs an optimizer. So a
reference never has one, and a policy has none until its training begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from dpofast.zero.weights import gathering, spread

# Modules with the sharded parameters that the forward of each needs.
_Units = list[tuple[nn.Module, list[Tensor]]]


@contextlib.contextmanager
def in_blocks(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, a model with sharded weights can run its forward.

    Each unit has its weights only during its own forward. A unit is a decoder block, or another
    module with a forward: the embeddings, the last norm, the head. If transformers doesn't name the
    decoder blocks, the whole model is gathered at once. A model that isn't sharded isn't changed,
    nor is one that has an engine, whose hooks gather the weights.

    All ranks must enter at the same time, run the model equally often, and leave at the same time.
    """
    has_engine = hasattr(model, "ds_id")  # set by the engine's hooks
    parameters = [] if has_engine else spread(model.parameters())
    units = _units(model) if parameters else []
    opened: list[contextlib.ExitStack] = []  # one for each unit whose forward is running
    handles = []
    for unit, needed in units:
        handles.append(unit.register_forward_pre_hook(partial(_gather, opened, needed)))
        handles.append(unit.register_forward_hook(partial(_release, opened)))
    try:
        # Without units the whole model is gathered; if nothing is sharded, this does nothing.
        with contextlib.nullcontext() if units else gathering(parameters):
            yield
    finally:
        for handle in handles:
            handle.remove()
        while opened:  # an exception ended a forward before its second hook
            opened.pop().close()


def _gather(opened: list[contextlib.ExitStack], needed: list[Tensor], *_: Any) -> None:
    """Gather a unit's weights before its forward."""
    stack = contextlib.ExitStack()
    stack.enter_context(gathering(needed))
    opened.append(stack)


def _release(opened: list[contextlib.ExitStack], *_: Any) -> None:
    """Give the weights of the unit back after its forward."""
    opened.pop().close()


def _units(model: nn.Module) -> _Units:
    """Find the units of a model; there are none if transformers doesn't name its decoder blocks.

    A module that reads another module's weights without calling it would find them missing. The
    hooks of DeepSpeed's engine have the same limit.
    """
    modules = list(model.modules())
    # transformers names the classes that must stay on one device: the decoder blocks.
    names = {name for m in modules for name in getattr(m, "_no_split_modules", None) or ()}
    blocks = {module for module in modules if type(module).__name__ in names}
    parts = _parts(model, blocks) if blocks else []
    return [(module, needed) for module, held in parts if (needed := spread(held))]


def _parts(module: nn.Module, blocks: set[nn.Module]) -> _Units:
    """Divide a module into parts with the parameters of each.

    A part is one of three: a block with all its parameters, a module that has no blocks in it (the
    largest such module, not its children), or a module around blocks with only its own parameters.
    """
    if module in blocks or blocks.isdisjoint(module.modules()):
        return [(module, list(module.parameters()))]
    parts: _Units = [(module, list(module.parameters(recurse=False)))]
    for child in module.children():
        parts += _parts(child, blocks)
    return parts


@contextlib.contextmanager
def runnable(trainer: Any) -> Iterator[None]:
    """Inside the `with` block, the model of a transformers Trainer can run its forward.

    This includes a model that ZeRO-3 has sharded and that has no DeepSpeed engine yet. All ranks
    must enter at the same time, run the model equally often, and leave at the same time.
    """
    model = trainer.model
    # Once there is an engine, `model_wrapped` is that engine, and its hooks gather the weights.
    if not trainer.is_deepspeed_enabled or trainer.model_wrapped is not model:
        yield
        return
    model.to(trainer.args.device)
    with in_blocks(model):
        yield
