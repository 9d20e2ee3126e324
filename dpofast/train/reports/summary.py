"""The facts of a run that summary.json holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from dpofast.data.packing.likelihood import Likelihood
from dpofast.data.packing.plan import StepSampler
from dpofast.data.packing.prompt_order import GroupedSampler
from dpofast.monitor.guard import ReportGuard
from dpofast.monitor.summary import SUMMARY_FILE, environment, last_evaluation, write_json
from dpofast.options.beta_fields import beta_in_words
from dpofast.options.config import DPOConfig
from dpofast.options.named_loss import loss_names
from dpofast.train.data.stream import RunStream
from dpofast.train.data.training_set import TrainingSet
from dpofast.train.reference.run_reference import RunReference
from dpofast.train.steps.loaders import StepLoaders, packing_summary
from dpofast_kernels import PreferenceLoss


def reference_summary(reference: RunReference) -> dict[str, Any]:
    """How many reference log-probs were needed, found and scored, and where they are stored."""
    store = reference.store
    total = store.totals()
    return {
        "ref_rows_needed": total.rows_needed if total else 0,
        "ref_store_hits": total.rows_found if total else 0,
        "ref_rows_scored": total.rows_scored if total else 0,
        "ref_forward_passes": total.forward_passes if total else 0,
        "ref_seconds": total.seconds if total else 0.0,
        "reference_store": None if reference.is_none else str(store.folder),
        "reference_identity": reference.identity.digest if reference.is_settled else None,
    }


def run_summary(
    config: DPOConfig,
    loaders: StepLoaders,
    datasets: Sequence[TrainingSet],
    plan: StepSampler | None,
    loss: PreferenceLoss,
    likelihood: Likelihood,
    mixed_precision: str,
) -> dict[str, Any]:
    """The facts that every run reports: reference, data, settings, memory, versions, hardware.

    A part that fails is missing, and named in a warning.

    Args:
        config: options of the run.
        loaders: loaders of its steps.
        datasets: all datasets of the run.
        plan: this rank's training steps; None if nothing is trained.
        loss: the loss of each pair.
        likelihood: the likelihood terms beside it.
        mixed_precision: accelerate's name for the autocast dtype, "no" without autocast.
    """
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "reference": lambda: reference_summary(loaders.reference),
        "data": lambda: {"data": {each.name: _data_summary(each) for each in datasets}},
        "layout": lambda: {"layout": loaders.layout.name},
        "packing": lambda: {"packing": packing_summary(plan)},
        "group_by_prompt": lambda: {"group_by_prompt": _order_summary(plan)},
        "settings": lambda: {
            "loss": repr(loss),
            "loss_type": loss_names(config, loss),
            "likelihood": asdict(likelihood) if likelihood else None,
            "beta_schedule": beta_in_words(config),
            "world_size": config.world_size,
            "pairs_per_step": config.pairs_per_rank * config.world_size,
            "mixed_precision": mixed_precision,
        },
        "environment": environment,
    }
    facts: dict[str, Any] = {}
    guard = ReportGuard()
    for name, part in parts.items():
        with guard(f"{SUMMARY_FILE}: its part {name!r}"):
            facts.update(part())
    return facts


def _order_summary(plan: StepSampler | None) -> dict[str, Any] | None:
    """The sizes of steps that keep prompts together; None for the usual steps."""
    return asdict(plan.order_figures()) if isinstance(plan, GroupedSampler) else None


def _data_summary(dataset: TrainingSet) -> dict[str, Any]:
    """A dataset's report; of a mixture also the pairs of each dataset, of a stream its progress."""
    report = dataset.report.as_dict()
    if isinstance(dataset, RunStream):
        return {**report, "stream": dataset.progress}
    return {**report, "sources": dataset.sources} if dataset.sources else report


def write_summary(
    folder: str | Path,
    output: TrainOutput,
    state: TrainerState,
    *,
    run_id: str | None,
    resumed_at_end: bool,
    first_loss: float | None,
    pairs_trained: int,
    pairs_before: int,
    throughput: dict[str, float],
    wall_seconds: float,
    run: dict[str, Any],
) -> None:
    """Write summary.json at the end of training.

    Args:
        folder: the run's output folder.
        output: what transformers' `train` returned.
        state: the Trainer's state after training.
        run_id: id of the run.
        resumed_at_end: whether the run was resumed at its last step, so that this call of `train`
            has no figures of steps.
        first_loss: mean loss over the pairs of the first step, in nats.
        pairs_trained: pairs in all steps; a pair counts once for each epoch that trained on it.
        pairs_before: those of the steps before the checkpoint that the run was resumed from.
        throughput: pairs and tokens a second, and MFU where it is known.
        wall_seconds: duration of reference scoring and training together.
        run: facts from `run_summary`.
    """
    seconds = output.metrics["train_runtime"]
    summary = {
        "run": run_id,
        "resumed_at_end": resumed_at_end,
        "first_loss": first_loss,
        "train_loss": None if resumed_at_end else output.training_loss,
        "global_step": output.global_step,
        "epochs": state.epoch,
        "pairs_trained": pairs_trained,
        "pairs_per_second": None if resumed_at_end else (pairs_trained - pairs_before) / seconds,
        "throughput": throughput,
        "train_seconds": seconds,
        "wall_seconds": wall_seconds,
        "num_tokens": state.num_input_tokens_seen,
        "last_evaluation": last_evaluation(state.log_history),
        **run,
    }
    write_json(Path(folder) / SUMMARY_FILE, summary)


def is_summarised(folder: str | Path, run_id: str | None, step: int) -> bool:
    """Whether a folder has the summary of a run with all its steps, written when it had ended.

    Args:
        folder: the run's output folder.
        run_id: id of the run.
        step: last step of the run.
    """
    try:
        summary = json.loads((Path(folder) / SUMMARY_FILE).read_text(encoding="utf-8"))
        return bool((summary["run"], summary["global_step"]) == (run_id, step))
    except (OSError, ValueError, KeyError, TypeError):
        return False
