"""Layers that pass something on from token to token, in packed rows."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dpofast.errors import ModelError
from dpofast.model.recurrent_families import (
    CONVOLUTION,
    CONVOLUTION_KERNEL,
    KERNELS,
    RECURRENT_FAMILIES,
    MakeShared,
    RecurrentFamily,
)
from dpofast.model.recurrent_probe import open_probe
from dpofast.model.replace import replaced_forwards, replaced_functions
from dpofast_kernels.attention import SharedLayout
from dpofast_kernels.recurrent import RowParts


def recurrent_family(lm: Any) -> RecurrentFamily | None:
    """The family of a causal LM, if it has layers that pass something on and can be packed."""
    return RECURRENT_FAMILIES.get(lm.config.model_type)


def why_not_replaced(lm: Any) -> str | None:
    """The reason why a model's mixers can't run packed rows; None if they can, or there are none.

    The reason is the rest of a sentence that begins with "Layout: padded, as ".
    """
    family = recurrent_family(lm)
    if family is None:
        return None
    mixers = _mixers(lm, family)
    expected = sum(each in family.layer_types for each in lm.config.layer_types)
    if len(mixers) < expected:
        return (
            f"{len(mixers)} of its {expected} layers with a state or a convolution are a "
            f"{family.mixer}, and only that is known"
        )
    return _why_renamed(mixers, family)


def refuse_renamed(lm: Any) -> None:
    """Refuse a model of a known family if its mixers lack functions that packed rows replace.

    Padded rows would be right, but slower than the packed rows that the user expects of this
    family. So the user has to ask for them.

    Raises:
        ModelError: names the functions.
    """
    family = recurrent_family(lm)
    if family is None:
        return
    if (reason := _why_renamed(_mixers(lm, family), family)) is not None:
        raise ModelError(
            f"layout: packed rows of {lm.config.model_type!r} would mix their sequences, as "
            f"{reason}; set layout: padded, or install another version of transformers."
        )


def describe_recurrence(lm: Any, device: torch.device) -> str | None:
    """How the recurrences of packed rows run on a device, in words; None if a model has none."""
    family = recurrent_family(lm)
    if family is None or family.kernel is None or not _mixers(lm, family):
        return None
    return family.kernel.describe(device)


def runs_kernel(lm: Any, device: torch.device) -> bool:
    """Whether a kernel of another package runs a model's recurrences on a device."""
    family = recurrent_family(lm)
    return family is not None and family.kernel is not None and family.kernel.runs_on(device)


def needs_device(lm: Any, device: torch.device) -> bool:
    """Whether transformers can call kernels in a model's mixers that run on this device only.

    Mixers of families that run padded count, too.
    """
    if recurrent_family(lm) is not None:
        return CONVOLUTION_KERNEL.runs_on(device) or runs_kernel(lm, device)
    homes = {type(module).__module__ for module in lm.modules()}
    has_mixers = any(hasattr(sys.modules.get(home), CONVOLUTION) for home in homes)
    return has_mixers and any(kernel.runs_on(device) for kernel in KERNELS)


@contextlib.contextmanager
def packed_recurrence(lm: Any, layout: SharedLayout | None) -> Iterator[None]:
    """Inside the `with` block, a model's mixers keep the sequences of a packed row apart.

    The shared prefix runs once, and each tail starts from the state and the inputs of its end. The
    backward belongs inside the block, too, because gradient checkpointing runs the layers again.

    Args:
        lm: causal LM.
        layout: layout of the packed row; None for padded rows, which keep the model's own layers,
            but for a kernel that would pass over adapters.
    """
    family = recurrent_family(lm)
    if family is None:
        yield
        return
    if layout is None:
        replace = partial(_forward_in_steps, family=family)
        mixers = [mixer for mixer in _mixers(lm, family) if family.whole and _has_adapter(mixer)]
    else:
        replace = partial(_packed_forward, family=family, parts=RowParts.of(layout.groups))
        mixers = _mixers(lm, family)
    with replaced_forwards([(mixer, partial(replace, own=mixer.forward)) for mixer in mixers]):
        yield


def _mixers(lm: Any, family: RecurrentFamily) -> list[nn.Module]:
    return [module for module in lm.modules() if type(module).__name__ == family.mixer]


def _why_renamed(mixers: list[nn.Module], family: RecurrentFamily) -> str | None:
    """The reason if the module of a model's mixers lacks functions that they are known to call."""
    names = {*family.functions, *family.whole}
    missing = sorted(name for name in names if mixers and not hasattr(_home(mixers[0]), name))
    if not missing:
        return None
    return f"this version of transformers has no {' and '.join(missing)} for {family.mixer}"


def _home(mixer: nn.Module) -> ModuleType:
    """The Python module in which a mixer looks its functions up."""
    return sys.modules[type(mixer).__module__]


def _packed_forward(
    mixer: nn.Module,
    *args: Any,
    own: Callable[..., Any],
    family: RecurrentFamily,
    parts: RowParts,
    **kwargs: Any,
) -> Any:
    """The forward of a mixer during a step with a packed row: its own, with other functions.

    Args:
        own: the mixer's own forward.
        family: what is replaced.
        parts: the parts of the row.
        args, kwargs: what the mixer's own forward takes.

    Raises:
        ModelError: the mixer has passed something on without the functions that are replaced.
    """
    home, called = _home(mixer), set()

    def shared(name: str, make_shared: MakeShared) -> Callable[..., Any]:
        function = getattr(home, name)
        replaced = make_shared(function, parts)

        def call(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            if (probe := open_probe()) is not None:
                probe.compare(name, function, replaced, parts, args, kwargs)
            return replaced(*args, **kwargs)

        return call

    functions = {name: shared(name, make) for name, make in family.functions.items()}
    with replaced_functions(home, {**functions, **dict.fromkeys(family.whole, _nothing)}):
        output = own(*args, **kwargs)
    if missing := [name for name in functions if name not in called]:
        raise ModelError(
            f"{family.mixer} ran a packed row without calling {' and '.join(missing)}, so it would "
            "mix the row's sequences; set layout: padded."
        )
    return output


def _has_adapter(mixer: nn.Module) -> bool:
    """Whether one of a mixer's own layers is inside another one, as peft's adapters have it."""
    return any(True for layer in mixer.children() for _ in layer.children())


def _forward_in_steps(
    mixer: nn.Module, *args: Any, own: Callable[..., Any], family: RecurrentFamily, **kwargs: Any
) -> Any:
    """The forward of a mixer without the kernel for all of it.

    This kernel takes the weight of the layer at its end, and so would leave out its adapter.
    """
    with replaced_functions(_home(mixer), dict.fromkeys(family.whole, _nothing)):
        return own(*args, **kwargs)


def _nothing(*_: Any, **__: Any) -> None:
    """Stands in for a function that runs a whole mixer in one kernel; None: there is no kernel."""
