"""Races the LM head with its DPO loss against plain PyTorch, its peers and the bare products.

python -m benchmarks.head --device cpu --json head.json

Every contender's result is compared with fp64 before it is timed. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from benchmarks.harness import positive
from benchmarks.head_cases import MODELS, Case, Inputs, make_inputs
from benchmarks.head_contenders import ENTRIES, OURS, contender
from benchmarks.head_losses import ALL, NAMES, race_losses
from benchmarks.head_statistics import CHOICES, race_statistics
from benchmarks.head_truth import MULTIPLE, Judge
from benchmarks.memory import peak_beyond_baseline
from benchmarks.suite import Benchmark, CaseRun, add_options, judge_all, settle, time_all
from dpofast_kernels import backend_for

MODULE = "benchmarks.head"
GPU_TOKENS = (4096, 8192, 16384, 32768)
TOKENS_PER_PAIR = 512  # scored tokens of a pair on a GPU, on average
# The head on which losses and statistics are raced on a CPU. It is small, so that all of them take
# a few minutes, and what one of them adds is a larger part of the whole.
SMALL_TOKENS, SMALL_HEAD = 512, (512, 32768)


def run_case(case: Case, options: argparse.Namespace) -> CaseRun:
    """Judge all contenders in every pass, then time those that were right."""
    torch.compiler.reset()  # torch.compile gives up on a function after 8 sizes
    inputs = make_inputs(case, options.device)
    run = CaseRun(case, options.ours or f"ours_{backend_for(inputs.hidden_states)}")
    # The processes that measure memory get labels and ref_logps from here: making them costs a
    # forward pass.
    run.payload = case, {"labels": inputs.labels.cpu(), "ref_logps": inputs.ref_logps.cpu()}
    judge = Judge(inputs)
    run.judge = {"naive_errors": judge.naive_errors, "error_bounds": judge.bounds}
    entered = judge_all(run, ENTRIES, inputs, judge, options)
    del judge  # frees its gradients in fp64 before the race
    time_all(run, entered, options)
    return run


def peaks(name: str, payload: Any, device: str) -> dict[str, Any]:
    """One contender's peak memory in bytes: beyond its inputs, and beyond inputs and gradients.

    Some contenders sum the weight's gradient in fp32, others in the inputs' dtype. The third peak,
    `beyond_inputs_gradients_and_fp32_d_weight`, also leaves out the bytes of an fp32 sum.
    """
    case, targets = payload
    inputs: Inputs = make_inputs(case, device, targets)
    made = contender(name, inputs, "forward_backward")
    if made.run is None:
        return {"reason": made.reason}
    peak = peak_beyond_baseline(made.run, device)
    beyond_gradients = peak - inputs.gradient_bytes
    # If the weight is in fp32, its gradient is itself the fp32 sum.
    fp32_sum = 4 * inputs.weight.numel() if inputs.weight.itemsize < 4 else 0
    return {
        "beyond_inputs": peak,
        "beyond_inputs_and_gradients": beyond_gradients,
        "beyond_inputs_gradients_and_fp32_d_weight": beyond_gradients - fp32_sum,
        "gradients": inputs.gradient_bytes,
        "fp32_d_weight": 4 * inputs.weight.numel(),
    }


BENCHMARK = Benchmark(
    name="head",
    module=MODULE,
    entries=ENTRIES,
    run_case=run_case,
    peaks=peaks,
    error_rule=f"at most {MULTIPLE:g} x naive PyTorch's in the same dtype, plus a floor",
)


def benchmark(options: argparse.Namespace) -> int:
    """Run the command line's cases and return the exit code, see `Benchmark.run`."""
    return BENCHMARK.run(cases_of(options), options)


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for: by default one on a CPU, twenty on a GPU."""
    if options.dry_run:
        return [Case("tiny", 96, 64, 1003, 3, options.dtype, even=False)]
    is_gpu = options.device == "cuda"
    heads = {name: MODELS[name] for name in options.shapes}
    if options.hidden or options.vocab:
        hidden_size, vocab_size = next(iter(heads.values()))
        heads = {"custom": (options.hidden or hidden_size, options.vocab or vocab_size)}
    return [
        Case(
            model,
            num_tokens,
            hidden_size,
            vocab_size,
            options.pairs or (max(1, num_tokens // TOKENS_PER_PAIR) if is_gpu else 8),
            options.dtype,
            even=not is_gpu,
        )
        for model, (hidden_size, vocab_size) in heads.items()
        for num_tokens in options.tokens
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; defaults depend on the device."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=HELP)
    add_options(parser, ENTRIES, OURS)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}")
    add(
        "--tokens",
        nargs="+",
        type=positive,
        metavar="N",
        help="scored tokens; several are several cases",
    )
    add("--hidden", type=positive, help="hidden size in place of the first shape's")
    add("--vocab", type=positive, help="vocabulary in place of the first shape's")
    add(
        "--losses",
        nargs="+",
        choices=(ALL, *NAMES),
        metavar="LOSS",
        help=f"race these losses against sigmoid instead: {', '.join(NAMES)}, or all",
    )
    add(
        "--statistics",
        nargs="+",
        choices=CHOICES,
        metavar="STATISTIC",
        help=f"race the head with these statistics against none instead: {', '.join(CHOICES)}",
    )
    add("--pairs", type=positive, help="default: 8 on a CPU, a pair per 512 tokens on a GPU")
    options = settle(parser, arguments)
    is_gpu = options.device == "cuda"
    if (options.losses or options.statistics) and not is_gpu and not options.shapes:
        hidden_size, vocab_size = SMALL_HEAD
        options.hidden, options.vocab = options.hidden or hidden_size, options.vocab or vocab_size
        options.tokens = options.tokens or [SMALL_TOKENS]
    options.shapes = options.shapes or (list(MODELS) if is_gpu else ["qwen2.5-0.5b"])
    options.tokens = options.tokens or (list(GPU_TOKENS) if is_gpu else [1024])
    for case in cases_of(options):
        if case.num_tokens < 2 * case.num_pairs:
            parser.error(
                f"argument --tokens: {case.num_tokens} tokens are too few for {case.num_pairs} "
                "pairs, each answer of which has one at least; lower --pairs"
            )
    return options


HELP = """Races the LM head with its DPO loss against plain PyTorch, TRL, Liger, CCE and the bare
products. On a GPU all five heads run at four sizes: pick with --shapes and --tokens, leave out what
compiles long with `--skip compile liger_dpo`, and what starts processes with --no-memory. Exit code
1 means that ours was wrong or failed; others may. With --losses or --statistics, a CPU runs a small
head unless --shapes names one: 512 tokens, hidden size 512 and a vocabulary of 32768, which takes
`--losses all --rounds 9` less than five minutes on two cores."""


def main() -> None:
    options = parse()
    if options.losses:
        sys.exit(race_losses(cases_of(options), options))
    elif options.statistics:
        sys.exit(race_statistics(cases_of(options), options))
    elif options.memory_of:
        BENCHMARK.child(options)
    else:
        sys.exit(benchmark(options))


if __name__ == "__main__":
    main()
