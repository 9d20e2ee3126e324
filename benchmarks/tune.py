"""Times launch configurations of the head's Triton kernels and keeps the fastest in the table.

python -m benchmarks.tune --write

Each kernel's entry for this machine's architecture is tried in turn, the others as they stand. What
doesn't compile, doesn't fit or gives another result than the present entry is left out. Without
--write the table is printed alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Clock, clock_for, one_line
from benchmarks.head_cases import MODELS, Case, Inputs, make_inputs
from dpofast.summary import hardware, versions
from dpofast_kernels import HeadOptions, linear_logps, linear_pair_loss, make_loss
from dpofast_kernels.head.launch import TABLE_FILE, architecture, launch_table, table_entry

ROUNDS = 7
# Every value that is tried of a kernel's constexprs, warps and stages.
CHOICES: dict[str, dict[str, list[Any]]] = {
    "score_rows": {"BV": [2048, 4096, 8192, 16384], "num_warps": [4, 8, 16]},
    "score_tiles": {
        "BM": [64, 128, 256],
        "BN": [128, 256],
        "BK": [64, 128],
        "DESCRIPTORS": [True, False],
        "num_warps": [4, 8],
        "num_stages": [2, 3, 4],
    },
    "score_tiles_wide": {
        "BM": [64, 128],
        "BN": [64, 128],
        "DESCRIPTORS": [True, False],
        "num_warps": [4, 8],
        "num_stages": [3, 4],
    },
    "finish_rows": {"BT": [256, 512, 1024], "num_warps": [1, 2, 4]},
    "target_products": {"BH": [512, 1024, 4096], "num_warps": [1, 2, 4]},
    "pair_loss": {"BN": [256, 1024, 4096], "num_warps": [1, 4]},
}
# Tiles of more products than this a thread spill on every architecture.
MAX_PRODUCTS_PER_WARP = 4096


def candidates(kernel: str, current: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The present configuration, then the others."""
    yield dict(current)
    choices = CHOICES[kernel]
    for values in product(*choices.values()):
        candidate = {**current, **dict(zip(choices, values, strict=True))}
        tile = candidate.get("BM", 0) * candidate.get("BN", 0)
        fits = kernel == "pair_loss" or tile <= MAX_PRODUCTS_PER_WARP * candidate["num_warps"]
        if candidate != current and fits:
            yield candidate


def work(kernel: str, inputs: Inputs) -> Callable[[], Tensor]:
    """A call that runs the kernel, and gives log-probs to compare."""
    if kernel == "score_tiles_wide":
        options = HeadOptions(backend="triton_fused", softcap=30.0)
    elif kernel in ("score_rows", "pair_loss"):
        options = HeadOptions(backend="triton")
    else:
        options = HeadOptions(backend="triton_fused")

    def run() -> Tensor:
        if kernel != "score_rows":
            with torch.no_grad():
                return linear_logps(inputs.hidden_states, inputs.weight, inputs.labels, options)
        output = linear_pair_loss(
            inputs.hidden_states,
            inputs.weight,
            inputs.labels,
            inputs.bounds,
            inputs.ref_logps,
            make_loss("sigmoid"),
            options,
        )
        torch.autograd.grad(output.loss, [inputs.hidden_states, inputs.weight])
        return output.logps

    return run


def tune(
    kernel: str, entry: dict[str, Any], inputs: Inputs, clock: Clock, limit: int | None
) -> None:
    """Put the fastest configuration of a kernel into `entry`, which is the table's own."""
    current, run = entry[kernel], work(kernel, inputs)
    expected = run()
    seconds: list[tuple[float, dict[str, Any]]] = []
    for number, candidate in enumerate(candidates(kernel, current)):
        if number == limit:
            break
        entry[kernel] = candidate
        try:
            found = run()
            if not torch.allclose(found, expected, rtol=1e-5, atol=1e-4):
                raise ValueError("another result")
            median = statistics.median(clock(run) for _ in range(ROUNDS))
        except Exception as error:  # compilers and launchers raise anything
            print(f"{kernel} {json.dumps(candidate)}: left out, {one_line(error)}", flush=True)
            continue
        print(f"{kernel} {json.dumps(candidate)}: {1e3 * median:.3f} ms", flush=True)
        seconds.append((median, candidate))
    entry[kernel] = min(seconds, key=lambda pair: pair[0])[1] if seconds else current


def as_text(table: dict[str, dict[str, Any]]) -> str:
    """The table as JSON, a line for each kernel."""
    entries = []
    for name, entry in table.items():
        lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items()]
        entries.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b", help="head's shape")
    parser.add_argument("--tokens", type=int, default=4096, help="N; default: %(default)s")
    parser.add_argument("--kernels", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--limit", type=int, help="of configurations tried for a kernel")
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted on the CPU")
    given = parser.parse_args()
    device = "cpu" if given.dry_run else "cuda"
    hidden_size, vocab_size = (64, 512) if given.dry_run else MODELS[given.model]
    tokens = 32 if given.dry_run else given.tokens
    case = Case(given.model, tokens, hidden_size, vocab_size, tokens // 16, "bfloat16", False)
    inputs = make_inputs(case, device)
    table = launch_table()
    entry = table[table_entry(architecture(inputs.weight.device))]
    for kernel in given.kernels:
        tune(kernel, entry, inputs, clock_for(device), given.limit)
    if not given.dry_run:
        entry["measured"] = {
            "device": torch.cuda.get_device_name(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "case": case.name,
            "hardware": hardware(),
            "versions": versions(),
        }
    print(as_text(table))
    if given.write and not given.dry_run:
        Path(TABLE_FILE).write_text(as_text(table))


if __name__ == "__main__":
    main()
