"""Keeps bitsandbytes from downloading and running code when it is imported.

On a CPU with AVX512-BF16, `bitsandbytes.backends.cpu.ops` asks the package `kernels`, if that is
installed, for a compiled kernel from Hugging Face's hub, and logs a warning if it gets none. Only
weights that were repacked for inference use this kernel, and dpofast never repacks any. As
transformers and peft import bitsandbytes wherever it is installed, this would happen in every run.
"""

from __future__ import annotations

import logging
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

ASKS_FOR_KERNEL = "bitsandbytes.backends.cpu.ops"


def keep_from_downloading() -> None:
    """Make a later import of bitsandbytes go on without the kernel, and without the warning."""
    if ASKS_FOR_KERNEL not in sys.modules and not any(map(_is_ours, sys.meta_path)):
        sys.meta_path.insert(0, _WithoutKernels())


class _WithoutKernels(MetaPathFinder):
    """Finds only the module that asks for the kernel, and hides `kernels` from it."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != ASKS_FOR_KERNEL:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            _hide_kernels(spec.loader)
        return spec


def _hide_kernels(loader: Any) -> None:
    """Make a loader run its module as if `kernels` weren't installed, and without its logs."""
    run = loader.exec_module

    def run_without(module: Any) -> None:
        logger, missing = logging.getLogger(ASKS_FOR_KERNEL), object()
        found, was_disabled = sys.modules.get("kernels", missing), logger.disabled
        sys.modules["kernels"] = None  # type: ignore[assignment]  # an import of it then fails
        logger.disabled = True
        try:
            run(module)
        finally:
            logger.disabled = was_disabled
            del sys.modules["kernels"]
            if found is not missing:
                sys.modules["kernels"] = found  # type: ignore[assignment]

    loader.exec_module = run_without


def _is_ours(finder: Any) -> bool:
    return isinstance(finder, _WithoutKernels)
