"""Where the time of a training step goes: kernels by their total time, and how busy the device is.

python -m benchmarks.gpu.step_profile --shape 0.5b --json profile.json
python -m benchmarks.gpu.step_profile --no-checkpointing --liger --json profile_liger.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from benchmarks.gpu.runner import write_whole
from benchmarks.gpu.stages import SHAPES
from benchmarks.stamps import stamps
from benchmarks.train_cases import Case, Work, gpu_case, prepare, tiny
from benchmarks.train_contenders import trainer_options
from dpofast.options.liger import why_not_here

STEPS = 3  # timed, the last of which is profiled
KERNELS = 100  # in the JSON
PRINTED = 20
NAME_LENGTH = 110


class Steps(TrainerCallback):
    """Times every step from device to device, and profiles the last one.

    Attributes:
        seconds: time of each step.
        tokens: body tokens of each step.
        profiled: the profile of the last step.
    """

    def __init__(self, device: str, last: int) -> None:
        self.device, self.last = device, last
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        # Only kernels on a GPU: to record the host's side would slow the host down.
        on_gpu = device == "cuda"
        self.profiled = profile(
            activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
        )

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self._wait()
        if state.global_step == self.last:
            self.profiled.start()
        self.tokens.append(0)
        self._started = time.perf_counter()

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self._wait()
        self.seconds.append(time.perf_counter() - self._started)
        if state.global_step == self.last + 1:
            self.profiled.stop()

    def count(self, _module: Any, given: tuple[Tensor, ...], _output: Any) -> None:
        """Add the tokens of a micro-batch; a hook of the embedding."""
        if self.tokens:  # the reference is scored before the first step
            self.tokens[-1] += given[0].numel()

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def profile_step(case: Case, folder: Path, device: str, liger: bool) -> dict[str, Any]:
    """Train some steps in our layout.

    Args:
        case: model and data.
        folder: what `prepare` has filled.
        device: "cuda" or "cpu".
        liger: whether Liger's layers run in place of the model's own.

    Returns:
        What was found; all times are in seconds.
    """
    from dpofast import DPOConfig, DPOTrainer
    from dpofast.model.liger import liger_names

    work = Work(folder, device, case.fixed_batch, case.steps)
    options = {**trainer_options(work, "profile"), "logging_steps": 1000}  # logging waits
    steps = Steps(device, case.steps)
    trainer = DPOTrainer(
        work.model(),
        args=DPOConfig(
            **options,
            layout="shared",
            max_tokens_per_microbatch=case.max_tokens,
            reference_store=str(folder / "store"),
            use_liger_kernel=liger,
        ),
        train_dataset=work.pairs,
        processing_class=work.tokenizer,
        callbacks=[steps],
    )
    trainer.model.get_input_embeddings().register_forward_hook(steps.count)
    trainer.train()
    kernels, busy = kernel_times(steps.profiled.events() or [])  # type: ignore[no-untyped-call]
    timed = slice(1, -1)  # the first step warms up
    return {
        "step_seconds": statistics.mean(steps.seconds[timed]),
        "tokens": statistics.mean(steps.tokens[timed]),
        "profiled_seconds": steps.seconds[-1],
        "profiled_tokens": steps.tokens[-1],
        "busy_seconds": busy,
        "kernels": kernels,
        "liger_layers": liger_names(trainer.model),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else None,
    }


def kernel_times(events: Iterable[Any]) -> tuple[list[dict[str, Any]], float]:
    """Kernels of a profile by their total time, and the time in which at least one ran."""
    on_device = [
        event
        for event in events
        # A marked span of the device's time is not a kernel.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    totals: dict[str, list[float]] = {}
    busy, reached = 0.0, 0.0
    for event in sorted(on_device, key=lambda each: each.time_range.start):
        start, end = event.time_range.start, event.time_range.end
        totals.setdefault(event.name[:NAME_LENGTH], []).append((end - start) / 1e6)
        busy += max(0.0, end - max(start, reached)) / 1e6
        reached = max(reached, end)
    longest = sorted(totals.items(), key=lambda each: -sum(each[1]))[:KERNELS]
    return [{"name": n, "calls": len(t), "seconds": sum(t)} for n, t in longest], busy


def case_of(options: argparse.Namespace) -> Case:
    """The case that the command line asks for."""
    case = replace(
        gpu_case(options.shape, (4,)), steps=STEPS, checkpointing=not options.no_checkpointing
    )
    return tiny(case) if options.dry_run else case


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.step_profile")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b", help="default: %(default)s")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--liger", action="store_true", help="Liger's norms, RoPE and MLPs")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    case, device = case_of(options), "cpu" if options.dry_run else "cuda"
    left_out = why_not_here(device) if options.liger else None
    found: dict[str, Any] = {"left_out": left_out}
    if left_out is None:
        with tempfile.TemporaryDirectory(prefix="dpofast-profile-") as name:
            prepare(case, Path(name), None)
            found |= profile_step(case, Path(name), device, options.liger)
    about = {"benchmark": "step_profile", "device": device, "dry_run": options.dry_run}
    result = {**about, "case": asdict(case), **found, "stamps": stamps("benchmarks.gpu")}
    write_whole(options.json, result)
    _print(found)


def _print(found: dict[str, Any]) -> None:
    if found["left_out"] is not None:
        print(f"left out: {found['left_out']}")
        return
    print(
        f"step {1e3 * found['step_seconds']:.1f} ms, {found['tokens']:.0f} tokens; with the "
        f"profiler {1e3 * found['profiled_seconds']:.1f} ms, of which the device is busy "
        f"{1e3 * found['busy_seconds']:.1f} ms; peak {found['peak_bytes']} bytes"
    )
    for kernel in found["kernels"][:PRINTED]:
        print(f"{1e3 * kernel['seconds']:9.2f} ms  {kernel['calls']:5d} x {kernel['name']}")


if __name__ == "__main__":
    main()
