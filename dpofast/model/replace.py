"""Replaces the forward of single modules, or functions of a Python module, for a while."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

# A module, and a function that takes the module as its first argument.
Replacement = tuple[nn.Module, Callable[..., Any]]


@contextlib.contextmanager
def replaced_forwards(replacements: Sequence[Replacement]) -> Iterator[None]:
    """Inside the `with` block, modules run the given forwards instead of their own.

    Args:
        replacements: each module with its new forward. Other modules of the same class keep theirs.
    """
    # accelerate can have put a forward with autocast on the instance itself. It is restored below;
    # otherwise deleting our forward brings back the one of the class.
    kept = [(module, module.__dict__.get("forward")) for module, _ in replacements]
    for module, function in replacements:
        module.forward = types.MethodType(function, module)
    try:
        yield
    finally:
        for module, forward in kept:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@contextlib.contextmanager
def replaced_functions(
    home: types.ModuleType, functions: Mapping[str, Callable[..., Any]]
) -> Iterator[None]:
    """Inside the `with` block, functions of a Python module are others.

    This should last for no longer than our own calls, as other code could meet them.
    """
    kept = {name: getattr(home, name) for name in functions}
    vars(home).update(functions)
    try:
        yield
    finally:
        vars(home).update(kept)
