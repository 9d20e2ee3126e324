"""Which back end runs where."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass

import torch

from dpofast_kernels.attention.flash import MAX_HEAD_DIM
from dpofast_kernels.attention.options import AttentionOptions

# "auto" takes the first that can run.
PREFERENCE = ("flash3", "varlen", "flash_attn", "flex", "sdpa", "plain")


@dataclass(frozen=True)
class Machine:
    """What the choice of a back end depends on.

    Attributes:
        device_type: "cpu", "cuda" (also ROCm's devices), ...
        is_rocm: whether PyTorch is built for ROCm.
        capability: compute capability, (0, 0) without CUDA.
        packages: flash attention packages that can be imported.
    """

    device_type: str
    is_rocm: bool = False
    capability: tuple[int, int] = (0, 0)
    packages: frozenset[str] = frozenset()


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """The facts about a device of this machine."""
    is_cuda = device.type == "cuda"
    packages = ("flash_attn", "flash_attn_interface")
    return Machine(
        device_type=device.type,
        is_rocm=torch.version.hip is not None,
        capability=torch.cuda.get_device_capability(device) if is_cuda else (0, 0),
        packages=frozenset(name for name in packages if is_cuda and _has_varlen(name)),
    )


def _has_varlen(package: str) -> bool:
    """Whether a package is installed, works with this PyTorch, and has the function we call.

    FlashAttention-4 installs a folder flash_attn without that function.
    """
    try:
        return hasattr(importlib.import_module(package), "flash_attn_varlen_func")
    except (ImportError, OSError, RuntimeError):  # built for another PyTorch or CUDA
        return False


def choose_backend(
    machine: Machine, dtype: torch.dtype, head_dim: int, options: AttentionOptions
) -> str:
    """The name of the back end to run.

    Args:
        machine: facts about the device.
        dtype: dtype to compute in.
        head_dim: padded head size.
        options: options of the op; `backend` is a name or "auto".

    Raises:
        ValueError: the back end asked for can't run, with the reason.
    """
    if options.backend == "auto":
        return next(
            name for name in PREFERENCE if why_not(name, machine, dtype, head_dim, options) is None
        )
    reason = why_not(options.backend, machine, dtype, head_dim, options)
    if reason is not None:
        raise ValueError(
            f"Attention backend {options.backend!r} was asked for, but {reason}: choose another, "
            "or 'auto'."
        )
    return options.backend


def why_not(
    name: str, machine: Machine, dtype: torch.dtype, head_dim: int, options: AttentionOptions
) -> str | None:
    """The reason why a back end can't run, or None if it can."""
    if name in ("flash3", "varlen", "flash_attn"):
        return _why_no_flash(name, machine, dtype, head_dim, options)
    if name == "flex":
        if machine.device_type != "cuda":
            return f"it has no backward on {machine.device_type}"
        return "it has no float64" if dtype == torch.float64 else None
    if name == "sdpa" and (options.softcap is not None or options.sinks is not None):
        return "it knows no softcap and no sinks"
    return None


def _why_no_flash(
    name: str, machine: Machine, dtype: torch.dtype, head_dim: int, options: AttentionOptions
) -> str | None:
    package = {"flash3": "flash_attn_interface", "flash_attn": "flash_attn"}.get(name)
    major = machine.capability[0]
    if machine.device_type != "cuda" or machine.is_rocm:
        return f"it runs on CUDA alone, not on {'ROCm' if machine.is_rocm else machine.device_type}"
    if package is not None and package not in machine.packages:
        return f"the package {package} isn't installed, or doesn't work with this PyTorch"
    if name == "flash3" and major != 9:
        return f"it needs compute capability 9 (Hopper), and this is {major}"
    if major < 8:
        return f"it needs compute capability 8 or above, and this is {major}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"it takes heads of at most {MAX_HEAD_DIM}, not {head_dim}"
    if options.sinks is not None:
        return "it knows no sinks"
    if options.softcap is not None and name != "flash_attn":
        return "it knows no softcap"
    return None
