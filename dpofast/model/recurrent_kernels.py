"""Kernels of other packages for layers with a state: which can run, and where."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# The kernels are written for GPUs. PyTorch gives AMD's the name "cuda", too.
KERNEL_DEVICES = frozenset({"cuda"})
# What a kernel must take so that one call can run many sequences.
_BOUNDARIES = frozenset({"cu_seqlens", "initial_state", "output_final_state"})


@dataclass(frozen=True)
class RecurrentKernel:
    """A kernel of another package, which transformers calls as well where it can be imported.

    Attributes:
        package: the package's name in the registry, used in messages.
        module: the Python module that the kernel is imported from.
        name: the function's name there.
        takes_sequences: whether one call runs several sequences, each from a state of its own, and
            gives their final states with gradients. If not, a call runs one part of a row.
    """

    package: str
    module: str
    name: str
    takes_sequences: bool

    def for_sequences(self, device: torch.device) -> Callable[..., Any] | None:
        """The function, if it runs several sequences in one call on this device; None if not."""
        if not self.takes_sequences or device.type not in KERNEL_DEVICES:
            return None
        found = _imported(self.module, self.name)
        return None if found.missing else found.function

    def runs_on(self, device: torch.device) -> bool:
        """Whether the kernel runs in place of transformers' torch function on this device."""
        return device.type in KERNEL_DEVICES and self.is_installed

    @property
    def is_installed(self) -> bool:
        """Whether the function can be imported, which transformers tries in the same way."""
        return _imported(self.module, self.name).function is not None

    def describe(self, device: torch.device) -> str:
        """How the recurrence runs on a device, in words for the log."""
        found = _imported(self.module, self.name)
        if device.type not in KERNEL_DEVICES:
            return "part by part, in transformers' torch functions"
        if found.function is None:
            return (
                f"part by part, in transformers' torch functions, as {self.name} of {self.package} "
                f"can't be imported ({found.error})"
            )
        kernel = f"in {self.name} of {self.package}"
        if not self.takes_sequences:
            return f"part by part, {kernel}, which takes one state for a whole row"
        if found.missing:
            return f"part by part, {kernel}, which takes no {' and no '.join(found.missing)}"
        return f"{kernel}, in one call for all prefixes and one for all tails"


@dataclass(frozen=True)
class _Imported:
    """What an attempt to import a kernel has given.

    Attributes:
        function: the kernel; None if it can't be imported.
        missing: arguments for several sequences that it doesn't take.
        error: why it can't be imported.
    """

    function: Callable[..., Any] | None = None
    missing: tuple[str, ...] = ()
    error: str = ""


@functools.cache
def _imported(module: str, name: str) -> _Imported:
    """Import a kernel; cached, because Python repeats an import that has failed."""
    try:
        function = getattr(importlib.import_module(module), name)
        taken = inspect.signature(function).parameters.keys()
    except Exception as error:  # a package built for another PyTorch can raise anything
        return _Imported(error=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return _Imported(function, missing=tuple(sorted(_BOUNDARIES - taken)))
