"""Figures that were measured on a card, from the files that benchmarks wrote there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Measured:
    """Measured seconds by what was measured; later files replace earlier ones.

    Attributes:
        heads: of our head, forward and backward, by (N, H, V).
        floors: of the bare products, by (N, H, V).
        steps: of a step per token, by shape, whether it was checkpointed, and whether layers were
            fused.
    """

    heads: dict[tuple[int, int, int], float] = field(default_factory=dict)
    floors: dict[tuple[int, int, int], float] = field(default_factory=dict)
    steps: dict[tuple[str, bool, bool], float] = field(default_factory=dict)


def read_measured(results: Path, card: str) -> Measured:
    """Read all results of a card under a folder; files of other kinds are passed over.

    Args:
        results: folder with JSON files.
        card: name of the card, which is a word of the device's name: "h200".
    """
    found = Measured()
    for result in _results(results, card):
        kind = result.get("benchmark")
        if kind == "head":
            for case in result["cases"]:
                timed = case.get("forward_backward", {})
                key = (case["N"], case["H"], case["V"])
                for name, times in ((case["ours"], found.heads), ("floor", found.floors)):
                    seconds = timed.get(name, {}).get("median")
                    if seconds and case["dtype"] == "bfloat16":
                        times[key] = seconds
        elif kind == "step_profile" and result["left_out"] is None:
            case = result["case"]
            key_of_step = case["shape"], case["checkpointing"], bool(result["liger_layers"])
            found.steps[key_of_step] = result["step_seconds"] / result["tokens"]
    return found


def _results(results: Path, card: str) -> Iterator[dict[str, Any]]:
    for path in sorted(results.rglob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        devices = result.get("stamps", {}).get("hardware", {}).get("devices", [])
        # A whole word: a GH200 is no H200.
        is_of_card = any(card.lower() in re.split(r"[\s-]+", name.lower()) for name in devices)
        if is_of_card and not result.get("dry_run"):
            yield result
