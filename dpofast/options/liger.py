"""The options use_liger_kernel and liger_kernel_config: Liger's layers for a model's own."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from packaging.version import Version

from dpofast.errors import ConfigError

OPTION, KINDS_OPTION = "use_liger_kernel", "liger_kernel_config"
OLDEST = "0.8.5"  # earlier versions rotate whole heads only
DEVICE_TYPES = frozenset({"cuda"})  # where Liger's kernels run; ROCm has this name, too
KINDS = ("rope", "rms_norm", "swiglu", "geglu", "layer_norm", "relu_squared")
# What Liger has as well, but dpofast does with kernels of its own.
OWN = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def check_liger(config: Any) -> list[str]:
    """Check the options before a model is loaded.

    Args:
        config: a DPOConfig, before transformers reads it.

    Returns:
        One remark if liger_kernel_config is given without effect.

    Raises:
        ConfigError: Liger's layers can't run here, or a kind of layer is unknown.
    """
    given = config.liger_kernel_config
    if not config.use_liger_kernel:
        return [] if given is None else [f"{KINDS_OPTION}={given!r} ({OPTION} is false)"]
    if not isinstance(given, dict | None):
        raise ConfigError(f"{KINDS_OPTION}: got {given!r}, expected a mapping.")
    for name, value in (given or {}).items():
        if name not in KINDS and name not in OWN:
            raise ConfigError(
                f"{KINDS_OPTION}: {name!r} is unknown; choose among {', '.join(KINDS)}."
            )
        if not isinstance(value, bool):
            raise ConfigError(f"{KINDS_OPTION}: {name}: got {value!r}, expected true or false.")
        if value and name in OWN:
            raise ConfigError(
                f"{KINDS_OPTION}: {name} isn't supported, as head and loss are dpofast's own; "
                "leave it out."
            )
    if (reason := why_not_here(_device_type(config))) is not None:
        raise ConfigError(f"{OPTION}: {reason}; set it to false here.")
    return []


def why_not_here(device_type: str) -> str | None:
    """The reason why Liger's layers can't run on a device of this type; None if they can."""
    if device_type not in DEVICE_TYPES:
        return "Liger's layers need a GPU, and this process has none"
    if not _is_here():
        return (
            f"liger-kernel {OLDEST} or later isn't installed "
            f"(`pip install 'liger-kernel>={OLDEST}'`)"
        )
    return None


def liger_kinds(config: Any) -> dict[str, bool] | None:
    """The arguments of Liger's patch; None where the model keeps its own layers."""
    return {**(config.liger_kernel_config or {}), **OWN} if config.use_liger_kernel else None


def _is_here() -> bool:
    try:
        return Version(metadata.version("liger-kernel")) >= Version(OLDEST)
    except metadata.PackageNotFoundError:
        return False


def _device_type(config: Any) -> str:
    return "cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu"
