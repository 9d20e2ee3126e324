"""The rates on which the model of the head rests, measured on this card.

python -m benchmarks.gpu.ceilings --json ceilings.json

For each head and number of rows: the bare products with every kind of result, our kernels, and the
whole head with several sizes of its workspace; besides, copies and casts. What fails is noted, and
the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.runner import write_whole
from benchmarks.harness import clock_for, one_line
from benchmarks.head_cases import BETA, Case, bounds_of
from benchmarks.model.head import HEADS, Size
from benchmarks.stamps import stamps
from dpofast_kernels import HeadOptions, linear_logps, linear_pair_loss, make_loss
from dpofast_kernels.head.backends import row_ops
from dpofast_kernels.head.cast import scale_and_cast

BF16, FP32 = torch.bfloat16, torch.float32
BACKENDS = ("triton", "triton_fused")
ROWS = (1536, 4096, 8192)
WORKSPACES = (1.0e9, 1.6e9, 2.5e9, 5.0e9)
TOY_SIZE, TOY_ROWS, TOY_WORKSPACES = Size(32, 256), (16,), (4e3,)
COPIED_BYTES = 2**32
LARGE = 8192  # rows and columns of a product that any card should run at its best rate
WARM_UPS, REPEATS = 2, 4
TOY_WARM_UPS, TOY_REPEATS = 0, 1


class Probe:
    """Times what it is given and keeps the rates.

    Args:
        file: JSON that is written after each section.
        dry_run: whether sizes are toys and the device is the CPU.
    """

    def __init__(self, file: Path, dry_run: bool) -> None:
        self.file, self.dry_run = file, dry_run
        self.device = "cpu" if dry_run else "cuda"
        self.heads = {"toy": TOY_SIZE} if dry_run else HEADS
        self.rows = TOY_ROWS if dry_run else ROWS
        self.clock = clock_for(self.device)
        self.result: dict[str, Any] = {
            "benchmark": "ceilings",
            "device": self.device,
            "dry_run": dry_run,
            "rates": {},
            "failures": {},
            "stamps": stamps("benchmarks.gpu.ceilings"),
        }

    def rate(self, name: str, amount: float, unit: str, run: Callable[[], Any]) -> None:
        """Time `run`, and note how much of `amount` it does per second; `unit` is 1e12 of that."""
        try:
            for _ in range(TOY_WARM_UPS if self.dry_run else WARM_UPS):
                run()
            repeats = TOY_REPEATS if self.dry_run else REPEATS
            seconds = statistics.median(self.clock(run) for _ in range(repeats))
        except Exception as error:  # the other figures matter as much
            self.result["failures"][name] = one_line(error)
            print(f"{name:60s} failed: {one_line(error)}", flush=True)
            return
        found = {"rate": amount / seconds / 1e12, "unit": unit, "seconds": seconds}
        self.result["rates"][name] = found
        print(f"{name:60s} {found['rate']:9.3f} {unit}, {1e3 * seconds:.3f} ms", flush=True)

    def section(self, run: Callable[[Probe], None]) -> None:
        """Run a section and write what is known by then."""
        print(f"== {run.__name__}", flush=True)
        try:
            run(self)
        except Exception as error:  # such as too little memory for its inputs
            self.result["failures"][run.__name__] = one_line(error)
            print(f"{run.__name__} failed: {one_line(error)}", flush=True)
        write_whole(self.file, self.result)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device).normal_(0.0, std)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)


def copies(probe: Probe) -> None:
    """The bandwidth of a large copy, and the rate of a large product."""
    size, side = (2**16, 64) if probe.dry_run else (COPIED_BYTES, LARGE)
    source, target = (probe.empty(size, dtype=torch.uint8) for _ in range(2))
    probe.rate("copy", 2.0 * size, "TB/s", lambda: target.copy_(source))
    left, right = probe.normal(side, side), probe.normal(side, side)
    probe.rate(f"product of {side}", 2.0 * side**3, "TFLOP/s", lambda: left @ right)


def casts(probe: Probe) -> None:
    """Gradients that are scaled and cast from fp32 to bf16: ours, and PyTorch's ways."""
    size = next(iter(probe.heads.values()))
    source = probe.normal(size.vocab, size.hidden, dtype=FP32)
    out = torch.empty_like(source, dtype=BF16)
    double = torch.tensor(0.25, dtype=torch.float64, device=probe.device)
    single, moved = double.float(), 6.0 * size.weights
    runs = {
        "scale_and_cast": lambda: scale_and_cast(source, double, out),
        "mul by an fp64 scalar": lambda: torch.mul(source, double, out=out),
        "mul by an fp32 scalar": lambda: torch.mul(source, single, out=out),
        "copy_": lambda: out.copy_(source),
    }
    for name, run in runs.items():
        probe.rate(f"cast: {name}", moved, "TB/s", run)


def products(probe: Probe) -> None:
    """The bare products of each head and chunk, by the kind of their result."""
    for name, size in probe.heads.items():
        weight = probe.normal(size.vocab, size.hidden, std=0.02)
        sums = probe.empty(size.vocab, size.hidden, dtype=FP32)
        rounded = probe.empty(size.vocab, size.hidden, dtype=BF16)
        for rows in probe.rows:
            x = probe.normal(rows, size.hidden)
            z, wide = probe.normal(rows, size.vocab), probe.empty(rows, size.vocab, dtype=FP32)
            d_x = probe.empty(rows, size.hidden, dtype=FP32)
            runs = {
                "dX, fp32": _wide_product(d_x, z, weight),
                "dW, bf16": _product(rounded, z.t(), x),
                "dW, fp32": _wide_product(sums, z.t(), x),
                "dW, added in fp32": _wide_sum(sums, z.t(), x),
                "logits, fp32": _wide_product(wide, x, weight.t()),
                "logits, bf16": _product(z, x, weight.t()),  # last: what it leaves is no gradient
            }
            for what, run in runs.items():
                probe.rate(f"{name}, {rows} rows: {what}", 2.0 * rows * size.weights, FLOPS, run)


def kernels(probe: Probe) -> None:
    """Scoring a chunk: its product with all the work on its rows, with and without gradients."""
    for name, size in probe.heads.items():
        weight = probe.normal(size.vocab, size.hidden, std=0.02)
        for rows in probe.rows:
            x = probe.normal(rows, size.hidden)
            labels = torch.randint(size.vocab, (rows,), device=probe.device)
            for backend in BACKENDS:
                ops = row_ops(backend, weight, HeadOptions(backend=backend))
                kept = ops.workspace_dtype(True)
                workspace = None if kept is None else probe.empty(rows, size.vocab, dtype=kept)
                probe.rate(
                    f"{name}, {rows} rows: {backend}, score",
                    *(2.0 * rows * size.weights, FLOPS),
                    _score(ops, x, labels, workspace),
                )


def heads(probe: Probe) -> None:
    """The whole head with several sizes of the workspace, and its forward alone."""
    sizes = TOY_WORKSPACES if probe.dry_run else WORKSPACES
    for name, size in probe.heads.items():
        rows = probe.rows[-1]
        bounds = bounds_of(Case("", rows, 1, 1, max(2, rows // 512), "bfloat16", even=False))
        x = probe.normal(rows, size.hidden).requires_grad_()
        weight = probe.normal(size.vocab, size.hidden, std=0.02).requires_grad_()
        labels = torch.randint(size.vocab, (rows,), device=probe.device)
        inputs, flop = (x, weight, labels, bounds), 6.0 * rows * size.weights
        for backend in BACKENDS:
            for limit in (None, *sizes):
                room = "default" if limit is None else f"{limit:.1e} bytes"
                options = HeadOptions(
                    backend=backend,
                    workspace_bytes=None if limit is None else int(limit),
                    upstream=1.0 / (len(bounds) // 2),
                )
                run = _head(inputs, options)
                probe.rate(f"{name}, {rows} rows: {backend}, {room}", flop, FLOPS, run)
            run = _forward(inputs, HeadOptions(backend=backend))
            probe.rate(f"{name}, {rows} rows: {backend}, forward", flop / 3, FLOPS, run)


FLOPS = "TFLOP/s"
SECTIONS = (copies, casts, products, kernels, heads)


def _product(out: Tensor, left: Tensor, right: Tensor) -> Callable[[], Any]:
    return lambda: torch.mm(left, right, out=out)


def _wide_product(out: Tensor, left: Tensor, right: Tensor) -> Callable[[], Any]:
    """out = left @ right in fp32; a CPU, which has no such product, gets fp32 factors."""
    if not out.is_cuda:
        return _product(out, left.float(), right.float())
    return lambda: torch.mm(left, right, out_dtype=FP32, out=out)


def _wide_sum(out: Tensor, left: Tensor, right: Tensor) -> Callable[[], Any]:
    """out += left @ right in fp32."""
    if not out.is_cuda:
        return lambda: out.addmm_(left.float(), right.float())
    return lambda: torch.addmm(out, left, right, out_dtype=FP32, out=out)


def _score(ops: Any, x: Tensor, labels: Tensor, workspace: Tensor | None) -> Callable[[], Any]:
    return lambda: ops.score(x, labels, workspace, True)


def _head(inputs: tuple[Tensor, ...], options: HeadOptions) -> Callable[[], Any]:
    x, weight, labels, bounds = inputs
    ref_logps = torch.full((len(bounds) - 1,), -3000.0, device=x.device)
    loss_of = make_loss("sigmoid", beta=BETA)

    def run() -> Any:
        output = linear_pair_loss(x, weight, labels, bounds, ref_logps, loss_of, options)
        return torch.autograd.grad(output.loss / (len(bounds) // 2), [x, weight])

    return run


def _forward(inputs: tuple[Tensor, ...], options: HeadOptions) -> Callable[[], Any]:
    x, weight, labels, _ = inputs

    @torch.no_grad()
    def run() -> Any:
        return linear_logps(x, weight, labels, options)

    return run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ceilings")
    names = [each.__name__ for each in SECTIONS]
    parser.add_argument("--sections", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    probe = Probe(options.json, options.dry_run)
    for section in SECTIONS:
        if section.__name__ in options.sections:
            probe.section(section)
    return 1 if probe.result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
