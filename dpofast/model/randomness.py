"""Finds out whether a model is random in training mode, by running it again on the same tokens."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.data.packing.padded_rows import collate_padded
from dpofast.model.attention import any_dtype_attention
from dpofast.model.checks import sample_sequences
from dpofast.model.forward import micro_batch, run_body
from dpofast.model.parts import causal_lm

# Largest relative difference between two passes over the same tokens that isn't noise. Repeated
# passes are equal to the bit, except where a device adds up in another order each time.
REPEAT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
REPEAT_TOLERANCE_OF_HALF = 1e-3
REPEATS = 2  # noise that draws among few choices can draw the same one twice

# A module, the tensors that went in, and those that came out.
_Call = tuple[nn.Module, list[Tensor], list[Tensor]]


def random_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Finds modules that draw random numbers in training mode, from a few tokens in padded rows.

    Noise of one module changes everything that comes after it. So of modules in a chain only the
    first one is found, and nothing is found where a module is random for longer sequences only.

    Args:
        model: causal LM or PeftModel, not wrapped by DDP or DeepSpeed.

    Returns:
        Modules by name; empty if the model isn't random.
    """
    batch = collate_padded(sample_sequences(model)).to(next(model.parameters()).device)
    names = {module: name for name, module in model.named_modules()}

    def calls() -> list[_Call]:
        with micro_batch(model, batch), _recorded(causal_lm(model)) as found:
            run_body(model, batch)
        return found

    with any_dtype_attention(causal_lm(model).config), training_mode_for_a_look(model):
        first = calls()
        for _ in range(REPEATS):
            module = _first_random(first, calls())
            if module is not None:
                return {names[module]: module}
    return {}


@contextlib.contextmanager
def training_mode_for_a_look(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, a model is in training mode, without gradients.

    Afterwards every module has its own mode, the buffers their values, and PyTorch's random
    generators their states. Inside, operations are deterministic where PyTorch knows how.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    kind = next(iter(devices)).type if devices else "cuda"
    with (
        torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        model.train()
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=only_warns)
            for module, mode in modes:
                module.training = mode
            for buffer, kept in buffers:
                buffer.copy_(kept)


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether two results of the same computation differ by more than their order of summation."""
    if first.shape != second.shape:
        return True
    if not first.is_floating_point():
        return not torch.equal(first, second)
    tolerance = REPEAT_TOLERANCE.get(first.dtype, REPEAT_TOLERANCE_OF_HALF)
    # NaN and infinities, as in masks, count as 0: only whether two results are equal matters.
    one, other = (torch.nan_to_num(t.double(), 0.0, 0.0, 0.0) for t in (first, second))
    return bool((one - other).norm() > tolerance * one.norm())


@contextlib.contextmanager
def _recorded(model: nn.Module) -> Iterator[list[_Call]]:
    """Collects the calls of all modules inside a model, in the order in which they end."""
    calls: list[_Call] = []
    inputs: dict[nn.Module, list[Tensor]] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        # Cloned, as some families multiply their noise onto the input in place.
        inputs[module] = [tensor.clone() for tensor in _tensors((args, kwargs))]

    def after(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        outputs = [tensor.clone() for tensor in _tensors(output)]
        calls.append((module, inputs.pop(module, []), outputs))

    handles: list[Any] = []
    for module in model.modules():
        if module is not model:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _first_random(first: list[_Call], second: list[_Call]) -> nn.Module | None:
    """The innermost module that made other outputs of the same inputs; None if there is none."""
    for (module, inputs, outputs), (other, other_inputs, other_outputs) in zip(
        first, second, strict=False
    ):
        if module is not other:
            return module  # a layer is left out at random
        if _any_differ(outputs, other_outputs) and not _any_differ(inputs, other_inputs):
            return module
    return None


def _any_differ(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) != len(second) or any(map(differ, first, second))


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
