"""The metric by which a run chooses its best checkpoint, looked for before training."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from dpofast.data.packing.pair_columns import set_names
from dpofast.errors import ConfigError
from dpofast.monitor.set_metrics import set_metric_names
from dpofast.options.config import DPOConfig
from dpofast.train.hooks.overrides import override_of
from dpofast.train.own.metrics import SPEEDS
from dpofast.train.steps.micro_batches import PairLossPass

# Methods whose overrides may add metrics to an evaluation.
MAY_ADD = ("evaluate", "_evaluate", "evaluation_loop")


def check_best_metric(trainer: Any, measured: PairLossPass) -> None:
    """Looks for metric_for_best_model among the metrics that evaluations will have.

    Args:
        trainer: a DPOTrainer that is about to train.
        measured: computes the metrics of its micro-batches.

    Raises:
        ConfigError: no evaluation will have this metric.
    """
    config: DPOConfig = trainer.args
    wanted = config.metric_for_best_model
    is_read = config.eval_strategy != IntervalStrategy.NO  # by every evaluation while it trains
    if wanted is None or not is_read or _may_measure_more(trainer):
        return
    is_named = isinstance(trainer.eval_dataset, dict)
    sets = {f"eval_{key}_" if is_named else "eval_": s for key, s in trainer.eval_sets().items()}
    names = measured.names_with(trainer.pair_loss)
    full = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    measured_by = {
        prefix: names
        if trainer.takes_answers
        else [*names, *set_metric_names(set_names(dataset.pairs))]
        for prefix, dataset in sets.items()
    } or {"eval_": names}
    choices = [prefix + name for prefix, found in measured_by.items() for name in found]
    speeds = [prefix + name for prefix in measured_by for name in SPEEDS]
    if full not in (*choices, *speeds):
        raise ConfigError(
            f"metric_for_best_model: no evaluation of this run measures {full!r}; choose among "
            f"{', '.join(choices)}."
        )


def _may_measure_more(trainer: Any) -> bool:
    """Whether a hook of the user may add metrics, whose names are known only then."""
    is_open = trainer.compute_metrics is not None and not trainer.args.prediction_loss_only
    return (
        is_open
        or any(override_of(trainer, name) for name in MAY_ADD)
        or any(map(_may_add_metrics, trainer.callback_handler.callbacks))
    )


def _may_add_metrics(callback: Any) -> bool:
    kind = type(callback)
    is_own = not kind.__module__.startswith(("transformers.", "dpofast."))
    return is_own and kind.on_evaluate is not TrainerCallback.on_evaluate
