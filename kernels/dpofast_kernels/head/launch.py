"""How each Triton kernel is launched on each architecture: launch.json, and who reads it.

The table stands in for tuning at every start; `python -m benchmarks.tune` measures it anew.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TABLE_FILE = Path(__file__).with_name("launch.json")


@lru_cache(maxsize=1)
def launch_table() -> dict[str, dict[str, Any]]:
    """By architecture: `measured` (null, or where and when), and by kernel its constexprs, warps
    and stages."""
    table: dict[str, dict[str, Any]] = json.loads(TABLE_FILE.read_text())
    return table


@lru_cache(maxsize=16)
def architecture(device: torch.device) -> str:
    """The table's name for a device: "sm_90", "gfx942", ...; that of the CPU is "cpu"."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def launch_options(kernel: str, device: torch.device) -> dict[str, Any]:
    """Constexprs, num_warps and num_stages for a kernel on a device.

    An architecture that the table lacks gets the entry of the nearest older one of its maker, or
    of the oldest.
    """
    options: dict[str, Any] = launch_table()[table_entry(architecture(device))][kernel]
    return options


def table_entry(name: str) -> str:
    """The table's entry that serves an architecture; that of "cpu" is the interpreter's."""
    table = launch_table()
    if name in table:
        return name
    if name.startswith("gfx"):
        return "gfx942"
    number = int(name.removeprefix("sm_"))
    known = [int(entry.removeprefix("sm_")) for entry in table if entry.startswith("sm_")]
    return f"sm_{max((entry for entry in known if entry <= number), default=min(known))}"
