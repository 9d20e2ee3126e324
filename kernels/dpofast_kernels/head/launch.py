"""Launch parameters of each Triton kernel on each architecture, read from launch.json.

Thanks to this table, no run has to tune kernels when it starts. `python -m benchmarks.tune`
measures its entries.
"""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE_FILE = Path(__file__).with_name("launch.json")


@lru_cache(maxsize=1)
def launch_table() -> dict[str, dict[str, Any]]:
    """Launch parameters by architecture, then by kernel: its constexprs, warps and stages.

    The entry `measured` of an architecture says where and when its values were measured; null means
    never.
    """
    table: dict[str, dict[str, Any]] = json.loads(TABLE_FILE.read_text())
    return table


@lru_cache(maxsize=16)
def architecture(device: torch.device) -> str:
    """The table's name for a device: "sm_90", "gfx942", ..., and "cpu" for the CPU."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def launch_options(kernel: str, device: torch.device) -> dict[str, Any]:
    """Constexprs, num_warps and num_stages for a kernel on a device.

    An NVIDIA architecture without an entry uses that of the nearest older one, or the oldest entry
    if there is none. An AMD architecture without an entry uses that of gfx942.
    """
    options: dict[str, Any] = launch_table()[table_entry(architecture(device))][kernel]
    return options


def table_entry(name: str) -> str:
    """The name of the table entry that serves an architecture; "cpu" serves the interpreter."""
    table = launch_table()
    if name in table:
        return name
    if name.startswith("gfx"):
        return "gfx942"
    number = int(name.removeprefix("sm_"))
    known = [int(entry.removeprefix("sm_")) for entry in table if entry.startswith("sm_")]
    return f"sm_{max((entry for entry in known if entry <= number), default=min(known))}"


def has_triton() -> bool:
    """Whether Triton is installed; it exists only on Linux."""
    return importlib.util.find_spec("triton") is not None


def takes_triton(tensor: Tensor, backend: str) -> bool:
    """Whether Triton kernels may work on a tensor: on a GPU, unless the call does without them."""
    return tensor.is_cuda and has_triton() and backend != "torch"


def is_interpreted(kernel: Any) -> bool:
    """Whether a jit function is interpreted, and so takes CPU tensors.

    Triton reads TRITON_INTERPRET when it is imported and when it decorates a kernel. So this
    function looks at the kernel, not at the variable. Triton is imported inside the function,
    because importing this file must leave time to set the variable.
    """
    from triton import JITFunction

    return not isinstance(kernel, JITFunction)
