"""Times launch configurations of the head's Triton kernels and keeps the fastest in the table.

python -m benchmarks.tune --write

Kernels are tuned one after the other, in calls of `linear_pair_loss` with its backward. Kernels
that aren't being tuned keep their entries. Configurations that don't compile, don't fit or differ
from the backend "torch" are left out. Without --write the table is only printed.
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
# The values that are tried for each kernel's constexprs, warps and stages.
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
# Tiles with more elements (BM x BN) per warp spill registers on every architecture.
MAX_PRODUCTS_PER_WARP = 4096
SMALL_VOCAB = 1024
# Allowed differences from the backend "torch": nats per token for log-probs, and for gradients
# relative to the norm. Backends round to bf16 at different places on the way to a gradient.
MAX_LOGP_ERROR = 1e-4
MAX_GRADIENT_ERROR = 1e-2


@dataclass(frozen=True)
class Work:
    """The call of the head that runs a kernel.

    Attributes:
        backend: backend of the head.
        softcap: softcap of the head.
        small: whether to use a small vocabulary. With the model's own, the matrix products would
            take so long that the kernel's time would not show.
    """

    backend: str
    softcap: float | None = None
    small: bool = False


WORK = {
    "score_rows": Work("triton"),
    "score_tiles": Work("triton_fused"),
    "score_tiles_wide": Work("triton_fused", softcap=30.0),
    "finish_rows": Work("triton_fused"),
    "target_products": Work("triton_fused", small=True),
    "pair_loss": Work("triton", small=True),
}


@dataclass(frozen=True, eq=False)
class Answers:
    """Results of a configuration; gradients are those of the loss summed over pairs."""

    logps: Tensor  # [2P]
    d_hidden_states: Tensor  # [N, H]
    d_weight: Tensor  # [V, H]


def work(kernel: str, inputs: Inputs, backend: str | None = None) -> Callable[[], Answers]:
    """A forward and backward that run the kernel, or the same work with another backend."""
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
    """What is wrong with the answers, in words; None if nothing is. NaN is wrong."""
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
    """Yield the present configuration, then all others."""
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
    """Put the fastest configuration of a kernel into `entry`.

    `entry` is the dict in the launch table itself, which the kernels read at each launch.

    Returns:
        Whether any configuration could be timed; if not, the present one stays.
    """
    current, run = entry[kernel], work(kernel, inputs)
    # Every candidate is compared with a backend that launches none of these kernels.
    expected = work(kernel, inputs, "torch")()
    seconds: list[tuple[float, dict[str, Any]]] = []
    for number, candidate in enumerate(candidates(kernel, current)):
        if number == limit:
            break
        entry[kernel] = candidate
        try:
            reason = complaint(run(), expected, inputs.bounds)
            median = statistics.median(clock(run) for _ in range(ROUNDS)) if not reason else 0.0
        except Exception as error:  # compilers and launchers can raise anything
            reason = one_line(error)
        if reason:
            print(f"{kernel} {json.dumps(candidate)}: left out, {reason}", flush=True)
            continue
        print(f"{kernel} {json.dumps(candidate)}: {1e3 * median:.3f} ms", flush=True)
        seconds.append((median, candidate))
    entry[kernel] = min(seconds, key=lambda pair: pair[0])[1] if seconds else current
    return bool(seconds)


def own_entry(table: Table, name: str) -> dict[str, Any]:
    """An architecture's entry; if it has none, a copy of the entry that it has used until now."""
    if name not in table:
        table[name] = {**deepcopy(table[table_entry(name)]), "measured": None}
    return table[name]


def as_text(table: Table) -> str:
    """The table as JSON, with one line per kernel."""
    entries = []
    for name, entry in table.items():
        lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items()]
        entries.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def case_for(kernel: str, given: argparse.Namespace) -> Case:
    """The case that a kernel is tuned on."""
    hidden_size, vocab_size = (64, 512) if given.dry_run else MODELS[given.model]
    tokens = 32 if given.dry_run else given.tokens
    num_pairs = max(tokens // TOKENS_PER_PAIR, 2)
    if WORK[kernel].small:
        vocab_size = min(vocab_size, SMALL_VOCAB)
    return Case(given.model, tokens, hidden_size, vocab_size, num_pairs, "bfloat16", even=False)


def stamp(case: Case) -> dict[str, Any]:
    """Device, date, case and versions of a measurement."""
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
        # Triton reads this when it is imported, which the head does at its first call.
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
            inputs = {case: make_inputs(case, device)}  # frees the inputs of the other case
        if tune(kernel, entry, inputs[case], clock, given.limit) and not given.dry_run:
            entry["measured"] = {**(entry["measured"] or {}), kernel: stamp(case)}
    print(as_text(table))
    if given.write and not given.dry_run:
        TABLE_FILE.write_text(as_text(table))


if __name__ == "__main__":
    main()
