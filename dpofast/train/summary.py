"""The facts of a run for summary.json, read off its trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpofast.monitor.summary import SUMMARY_FILE, environment, last_evaluation, write_json


def reference_summary(trainer: Any) -> dict[str, Any]:
    """How many reference log-probs were needed, found and scored, and where they are stored."""
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


def run_summary(trainer: Any) -> dict[str, Any]:
    """What every kind of run reports: reference, data, settings, memory, versions, hardware."""
    return {
        **reference_summary(trainer),
        "data": {name: report.as_dict() for name, report in trainer.data.reports.items()},
        "layout": trainer.layout.name,
        "packing": trainer.loaders.packing,
        "loss": repr(trainer.pair_loss),
        "world_size": trainer.args.world_size,
        "pairs_per_step": trainer.get_total_train_batch_size(trainer.args),
        "mixed_precision": trainer.accelerator.mixed_precision,
        **environment(),
    }


def write_summary(trainer: Any, output: Any, wall_seconds: float) -> None:
    """Write summary.json at the end of training.

    Args:
        trainer: a DPOTrainer that has trained.
        output: what transformers' `train` returned.
        wall_seconds: duration of reference scoring and training together.
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
