"""Times launch configurations of the head's Triton kernels and keeps the fastest in the table.

python -m benchmarks.tune --write

Each kernel's entry for this machine's architecture is tried in turn, the others as they stand, in
calls of `linear_pair_loss` with its backward. What doesn't compile, doesn't fit or differs from the
backend "torch" is left out. Without --write the table is printed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Clock, clock_for, one_line
from benchmarks.head import TOKENS_PER_PAIR
from benchmarks.head_cases import BETA, MODELS, Case, Inputs, make_inputs
from dpofast.monitor.summary import versions
from dpofast_kernels import HeadOptions, linear_pair_loss, make_loss
from dpofast_kernels.head.launch import TABLE_FILE, architecture, launch_table, table_entry

Table = dict[str, dict[str, Any]]

ROUNDS = 7
# Every value that is tried of a kernel's constexprs, warps and stages.
CHOICES: dict[str, dict[str, list[Any]]] = {
    "score_rows": {"BV": [2048, 4096, 8192, 16384], "num_warps": [4, 8, 16]},
    "differentiate_rows": {"BV": [2048, 4096, 8192, 16384], "num_warps": [4, 8, 16]},
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
# Tiles of more products than this a warp spill on every architecture.
MAX_PRODUCTS_PER_WARP = 4096
SMALL_VOCAB = 1024
# Against the backend "torch": of a log-prob, in nats, and of a gradient's norm. Gradients are made
# from numbers that were rounded to bf16, each backend's at another place.
MAX_LOGP_ERROR = 1e-4
MAX_GRADIENT_ERROR = 1e-2


@dataclass(frozen=True)
class Work:
    """Which calls run a kernel.

    Attributes:
        backend: of the head.
        softcap: of the head.
        small: whether the vocabulary is to be a small one, as the kernel's time is lost in that of
            whole products.
    """

    backend: str
    softcap: float | None = None
    small: bool = False


WORK = {
    "score_rows": Work("triton"),
    "differentiate_rows": Work("triton"),
    "score_tiles": Work("triton_fused"),
    "score_tiles_wide": Work("triton_fused", softcap=30.0),
    "finish_rows": Work("triton_fused"),
    "target_products": Work("triton_fused", small=True),
    "pair_loss": Work("triton", small=True),
}


@dataclass(frozen=True, eq=False)
class Answers:
    """What every configuration has to give; gradients are of the loss summed over pairs."""

    logps: Tensor  # [2P]
    d_hidden_states: Tensor  # [N, H]
    d_weight: Tensor  # [V, H]


def work(kernel: str, inputs: Inputs, backend: str | None = None) -> Callable[[], Answers]:
    """A forward and backward that run the kernel, or do the same by another backend."""
    told = WORK[kernel]
    options = HeadOptions(backend=backend or told.backend, softcap=told.softcap)
    loss = make_loss("sigmoid", beta=BETA)

    def run() -> Answers:
        output = linear_pair_loss(
            inputs.hidden_states,
            inputs.weight,
            inputs.labels,
            inputs.bounds,
            inputs.ref_logps,
            loss,
            options,
        )
        gradients = torch.autograd.grad(output.loss, [inputs.hidden_states, inputs.weight])
        return Answers(output.logps, *gradients)

    return run


def complaint(found: Answers, expected: Answers, bounds: Tensor) -> str | None:
    """What is wrong with the answers; None where nothing is. NaN is wrong."""
    lengths = bounds.diff().to(found.logps.device)
    error = float(((found.logps - expected.logps).abs() / lengths).max())
    if not error <= MAX_LOGP_ERROR:
        return f"log-probs are off by {error:.1e} a token"
    for name in ("d_hidden_states", "d_weight"):
        exact = getattr(expected, name).float()
        error = float((getattr(found, name).float() - exact).norm() / exact.norm())
        if not error <= MAX_GRADIENT_ERROR:
            return f"{name} is off by {error:.1e}"
    return None


def candidates(kernel: str, current: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The present configuration, then the others."""
    yield dict(current)
    choices = CHOICES[kernel]
    for values in product(*choices.values()):
        candidate = {**current, **dict(zip(choices, values, strict=True))}
        tile = candidate.get("BM", 0) * candidate.get("BN", 0)
        if candidate != current and tile <= MAX_PRODUCTS_PER_WARP * candidate["num_warps"]:
            yield candidate


def tune(
    kernel: str, entry: dict[str, Any], inputs: Inputs, clock: Clock, limit: int | None
) -> bool:
    """Put the fastest configuration of a kernel into `entry`, which is the table's own.

    Returns:
        Whether any could be timed; else the present one stays.
    """
    current, run = entry[kernel], work(kernel, inputs)
    expected = work(kernel, inputs, "torch")()
    seconds: list[tuple[float, dict[str, Any]]] = []
    for number, candidate in enumerate(candidates(kernel, current)):
        if number == limit:
            break
        entry[kernel] = candidate
        try:
            reason = complaint(run(), expected, inputs.bounds)
            median = statistics.median(clock(run) for _ in range(ROUNDS)) if not reason else 0.0
        except Exception as error:  # compilers and launchers raise anything
            reason = one_line(error)
        if reason:
            print(f"{kernel} {json.dumps(candidate)}: left out, {reason}", flush=True)
            continue
        print(f"{kernel} {json.dumps(candidate)}: {1e3 * median:.3f} ms", flush=True)
        seconds.append((median, candidate))
    entry[kernel] = min(seconds, key=lambda pair: pair[0])[1] if seconds else current
    return bool(seconds)


def own_entry(table: Table, name: str) -> dict[str, Any]:
    """An architecture's entry; where the table lacks one, it gets a copy of what served it."""
    if name not in table:
        table[name] = {**deepcopy(table[table_entry(name)]), "measured": None}
    return table[name]


def as_text(table: Table) -> str:
    """The table as JSON, a line for each kernel."""
    entries = []
    for name, entry in table.items():
        lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items()]
        entries.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def case_for(kernel: str, given: argparse.Namespace) -> Case:
    hidden_size, vocab_size = (64, 512) if given.dry_run else MODELS[given.model]
    tokens = 32 if given.dry_run else given.tokens
    num_pairs = max(tokens // TOKENS_PER_PAIR, 2)
    if WORK[kernel].small:
        vocab_size = min(vocab_size, SMALL_VOCAB)
    return Case(given.model, tokens, hidden_size, vocab_size, num_pairs, "bfloat16", even=False)


def stamp(case: Case) -> dict[str, Any]:
    """Where, when, on what and with what a kernel was measured."""
    return {
        "device": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "case": f"{case.name}, H={case.hidden_size}, V={case.vocab_size}",
        "versions": versions(),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b", help="head's shape")
    parser.add_argument("--tokens", type=int, default=4096, help="N; default: %(default)s")
    parser.add_argument("--kernels", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--limit", type=int, help="of configurations tried for a kernel")
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted on the CPU")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    if given.dry_run:
        # read when Triton is imported, which is when the head first needs it
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("There is no CUDA or ROCm device to measure on; --dry-run does without.")
    device = "cpu" if given.dry_run else "cuda"
    table = launch_table()
    entry = own_entry(table, architecture(torch.device(device)))
    clock, inputs = clock_for(device), dict[Case, Inputs]()
    for kernel in given.kernels:
        case = case_for(kernel, given)
        if case not in inputs:
            inputs = {case: make_inputs(case, device)}  # the other case's memory is given back
        if tune(kernel, entry, inputs[case], clock, given.limit) and not given.dry_run:
            entry["measured"] = {**(entry["measured"] or {}), kernel: stamp(case)}
    print(as_text(table))
    if given.write and not given.dry_run:
        TABLE_FILE.write_text(as_text(table))


if __name__ == "__main__":
    main()
