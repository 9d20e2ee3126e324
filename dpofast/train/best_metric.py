"""The metric by which a run chooses its best checkpoint, looked for before training."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from dpofast.errors import ConfigError
from dpofast.model.router import METRIC
from dpofast.options.config import DPOConfig
from dpofast_kernels import METRIC_NAMES

MEASURED = ("loss", *METRIC_NAMES)
SPEEDS = ("runtime", "samples_per_second", "steps_per_second")


def check_best_metric(
    config: DPOConfig, sets: Collection[str], callbacks: Collection[TrainerCallback], router: bool
) -> None:
    """Looks for metric_for_best_model among the metrics that evaluations will have.

    Args:
        config: options of the run.
        sets: names of the held-out sets; empty for a single one.
        callbacks: callbacks of the run; those of the user may add metrics.
        router: whether the auxiliary loss of routers is measured.

    Raises:
        ConfigError: no evaluation will have this metric.
    """
    wanted = config.metric_for_best_model
    is_read = config.eval_strategy != IntervalStrategy.NO  # by every evaluation while it trains
    if wanted is None or not is_read or any(map(_may_add_metrics, callbacks)):
        return
    names = [*MEASURED, *([METRIC] if router else [])]
    prefixes = [f"eval_{name}_" for name in sets] or ["eval_"]
    full = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    known = {prefix + name for prefix in prefixes for name in (*names, *SPEEDS)}
    if full not in known:
        choices = [f"{prefix}{name}" for prefix in prefixes for name in names]
        raise ConfigError(
            f"metric_for_best_model: no evaluation of this run measures {full!r}; choose among "
            f"{', '.join(choices)}."
        )


def _may_add_metrics(callback: Any) -> bool:
    kind = type(callback)
    is_own = not kind.__module__.startswith(("transformers.", "dpofast."))
    return is_own and kind.on_evaluate is not TrainerCallback.on_evaluate
