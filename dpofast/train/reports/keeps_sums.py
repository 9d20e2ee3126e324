"""The running sums of a run's logs, which are part of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from dpofast.train.exchange import exchange
from dpofast.train.reports.reports_run import ReportsRun


class KeepsSums(ReportsRun, Trainer):
    """Makes the logs of a resumed run those of a run that never stopped.

    The sums since the last log go into each checkpoint, for each rank. The mean loss of the run,
    its first loss and the number of its pairs go on, too.
    """

    _sums_to_restore: list[dict[str, Any]] | None = None
    _counts_whole_run = True  # whether the sums go back to the run's first step

    def sums_of_ranks(self) -> list[dict[str, Any]]:
        """What each rank has added up, as JSON types in rank order; all ranks call this together.

        A checkpoint that is saved elsewhere than in the training loop has empty sums.
        """
        loss = getattr(self, "_tr_loss", None)
        return exchange(
            {
                "loss": 0.0 if loss is None else loss.item(),
                "total_loss": getattr(self, "_total_loss_scalar", 0.0),
                "last_log": getattr(self, "_globalstep_last_logged", 0),
                "metrics": self.metric_sums.recorded(),
                "counts": self.throughput.recorded(),
                "first_loss": self.first_loss,
                "pairs_trained": self.pairs_trained,
            }
        )

    def restore_sums(self, recorded: list[dict[str, Any]] | None, *, is_resumed: bool) -> None:
        """Let the next call of transformers' `train` go on with the sums of a checkpoint.

        Args:
            recorded: what `sums_of_ranks` returned; None if there is nothing to restore.
            is_resumed: whether the run resumes from a checkpoint.
        """
        self._sums_to_restore = recorded
        self._counts_whole_run = recorded is not None or not is_resumed

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        recorded, self._sums_to_restore = self._sums_to_restore, None
        if recorded is not None:  # the loop has just set its sums to 0
            self._restore(recorded)
        super()._run_epoch(*args, **options)

    def _restore(self, recorded: list[dict[str, Any]]) -> None:
        rank, ranks = self.args.process_index, self.args.world_size
        own = recorded[rank] if len(recorded) == ranks else _shared(recorded, rank)
        self._tr_loss = torch.tensor(own["loss"], device=self.args.device)
        self._total_loss_scalar = own["total_loss"]
        self._globalstep_last_logged = own["last_log"]
        self.metric_sums.restore(own["metrics"])
        self.throughput.restore(own["counts"])
        self.first_loss = own["first_loss"]
        self.pairs_trained = self.pairs_before = own["pairs_trained"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and self._counts_whole_run:  # the log at the end of training
            logs["train_loss"] = self._mean_loss()
        super().log(logs, start_time)

    def _finalize_training(self, *args: Any, **options: Any) -> TrainOutput:
        output = super()._finalize_training(*args, **options)
        if "train_loss" not in output.metrics:  # nothing was trained
            return output
        return output._replace(training_loss=output.metrics["train_loss"])

    def _mean_loss(self) -> float:
        """The mean over all steps of the run of a step's loss.

        transformers divides the sum by the steps of this call, or by all, depending on its version.
        """
        return float(self._total_loss_scalar / max(self.state.global_step, 0.001))


def _shared(recorded: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    """What a rank gets of the sums of another number of ranks, so that sums over ranks are kept."""
    first = recorded[0]
    metrics = [each["metrics"] for each in recorded]
    share = 1.0 if rank == 0 else 0.0
    added = {
        kind: {
            name: share * sum(each.get(kind, {}).get(name, 0.0) for each in metrics)
            for name in metrics[0].get(kind, {})
        }
        for kind in ("sums", "counts")
    }
    num_pairs = int(share) * sum(each["num_pairs"] for each in metrics)
    counts = {
        name: share * sum(each["counts"][name] for each in recorded) for name in first["counts"]
    }
    return {
        **first,
        "loss": sum(each["loss"] for each in recorded) / len(recorded),  # logs take the mean
        "metrics": {**added, "num_pairs": num_pairs},
        "counts": counts,
    }
