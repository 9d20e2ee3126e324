"""summary.json: what a comparison of runs needs, in one file of the output folder."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dpofast.train.trainer import DPOTrainer

SUMMARY_FILE = "summary.json"
PACKAGES = ("dpofast", "torch", "triton", "transformers", "accelerate", "deepspeed", "peft")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a run's figures; None if missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """The devices that a run has, and the machine's threads."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "devices": devices or ["cpu"],
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def peak_memory_bytes() -> dict[str, int]:
    """Peak of this process (host), and of what PyTorch allocated on the current GPU."""
    # Linux counts in KiB, macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.max_memory_allocated()
    return peaks


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON, parents included; what JSON has no form for becomes text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def reference_summary(trainer: DPOTrainer) -> dict[str, Any]:
    """How many reference rows were needed, found and made, and where they lie."""
    provider = trainer.reference.provider
    total, identity = provider.totals(), provider.identity
    return {
        "ref_rows_needed": total.rows_needed if total else 0,
        "ref_store_hits": total.rows_found if total else 0,
        "ref_rows_scored": total.rows_scored if total else 0,
        "ref_forward_passes": total.forward_passes if total else 0,
        "ref_seconds": total.seconds if total else 0.0,
        "reference_store": str(provider.folder),
        "reference_identity": identity.digest if identity else None,
    }


def run_summary(trainer: DPOTrainer) -> dict[str, Any]:
    """What every kind of run reports: data, reference, settings, versions, hardware, memory."""
    return {
        **reference_summary(trainer),
        "data": {name: r.as_dict() for name, r in trainer.data.reports.items()},
        "layout": trainer.layout.name,
        "packing": trainer.loaders.packing,
        "loss": repr(trainer.pair_loss),
        "world_size": trainer.args.world_size,
        "pairs_per_step": trainer.get_total_train_batch_size(trainer.args),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": versions(),
        "hardware": hardware(),
    }


def last_evaluation(log_history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Everything that was logged at the step of the last evaluation, of all named sets."""
    logs = [log for log in log_history if any(key.startswith("eval_") for key in log)]
    last = [log for log in logs if log["step"] == logs[-1]["step"]]
    return {name: value for log in last for name, value in log.items()} or None


def write_summary(trainer: DPOTrainer, output: Any, wall_seconds: float) -> None:
    """Write summary.json at the end of training.

    Args:
        trainer: that has trained.
        output: what transformers' `train` returned.
        wall_seconds: of reference scoring and training together.
    """
    seconds = output.metrics["train_runtime"]
    summary = {
        "first_loss": trainer.first_loss,
        "train_loss": output.training_loss,
        "global_step": output.global_step,
        "epochs": trainer.state.epoch,
        "pairs_trained": trainer.pairs_trained,
        "pairs_per_second": trainer.pairs_trained / seconds,
        "throughput": trainer.throughput.summary(),
        "train_seconds": seconds,
        "wall_seconds": wall_seconds,
        "num_tokens": trainer.state.num_input_tokens_seen,
        "last_evaluation": last_evaluation(trainer.state.log_history),
        **run_summary(trainer),
    }
    write_json(Path(trainer.args.output_dir) / SUMMARY_FILE, summary)
