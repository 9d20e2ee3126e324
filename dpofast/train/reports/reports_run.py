"""The reports of a run: the figures of each log, summary.json and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from dpofast.monitor.callbacks import LogsLastSteps
from dpofast.monitor.guard import ReportGuard
from dpofast.monitor.metrics import MetricSums
from dpofast.monitor.plots import PLOT_FILE, plot_run
from dpofast.monitor.public_names import public_name
from dpofast.monitor.summary import SUMMARY_FILE
from dpofast.monitor.throughput import Throughput
from dpofast.train.data.dataset import PairPreparer, log_report
from dpofast.train.data.stream import RunStream
from dpofast.train.data.training_set import prepare_training_set
from dpofast.train.reports.summary import is_summarised, run_summary, write_summary
from dpofast.train.steps.loaders import StepLoaders
from dpofast.train.steps.micro_batches import PairLossPass
from dpofast.train.steps.moves_beta import MovesBeta
from dpofast.train.steps.whole_steps import TakesWholeSteps
from dpofast_kernels import PreferenceLoss


class ReportsRun(MovesBeta, TakesWholeSteps, Trainer):
    """Counts what a run trains, adds the figures to its logs, and writes its summary and plot.

    Attributes:
        first_loss: mean loss of the run's first step, in nats; None until it is known.
        pairs_trained: pairs of all steps of the run, on all ranks.
        pairs_before: those of its steps before the checkpoint that it was resumed from.
        metric_sums: metrics of this rank's pairs since the last log.
        tokens_trained: tokens trained on this rank since the last sum over all ranks.
        plot_file: plot of this call of `train`; None until it is drawn.
    """

    train_dataset: Any
    data: PairPreparer
    loaders: StepLoaders
    _pair_loss_pass: PairLossPass
    pair_loss: PreferenceLoss
    throughput: Throughput
    first_loss: float | None
    pairs_trained: int
    pairs_before: int
    metric_sums: MetricSums
    tokens_trained: int
    plot_file: Path | None
    run_id: str | None
    resumed_at_end: bool
    _tr_loss: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.add_callback(LogsLastSteps())

    def start_counting(self) -> None:
        """Set all counts to 0."""
        self.first_loss = None
        self.pairs_trained = self.pairs_before = 0
        self.metric_sums = MetricSums()
        self.tokens_trained = 0
        self.plot_file = None

    def sum_over_ranks(self, vector: Tensor) -> Tensor:
        """Add up a vector over the ranks, which must call this together."""
        total: Tensor = self.accelerator.reduce(vector, reduction="sum")
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and "learning_rate" in logs:  # a log of training, not of evaluation
            means = self.metric_sums.means(self.sum_over_ranks, self.args.device)
            means = self._pair_loss_pass.finish(means)
            self.count_tokens()
            # The Trainer's own loss is summed in float32; this one is the exact mean over pairs.
            speed = self.throughput.metrics(self.sum_over_ranks)
            tokens = {"num_tokens": self.state.num_input_tokens_seen}
            logs = {**logs, **self.logged_beta(), **means, **speed, **tokens}
        super().log(logs, start_time)

    def _finalize_training(self, *args: Any, **options: Any) -> TrainOutput:
        # Steps since the last log, if nothing logs at the end: transformers would take this rank's.
        self._tr_loss = self.sum_over_ranks(self._tr_loss) / self.args.world_size
        return super()._finalize_training(*args, **options)

    def count_tokens(self) -> None:
        """Add the tokens of all ranks to the Trainer's state; every rank must call this."""
        tokens = torch.tensor(self.tokens_trained, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.sum_over_ranks(tokens))
        self.tokens_trained = 0

    def write_results(self, output: TrainOutput, wall_seconds: float) -> None:
        """Write summary.json and the plot of the run; what can't be written is a warning.

        Args:
            output: what transformers' `train` returned.
            wall_seconds: duration of reference scoring and training together.
        """
        folder = Path(self.args.output_dir)
        guard = ReportGuard()
        for stream in self.data.datasets:
            if isinstance(stream, RunStream):
                log_report(stream.report)
        step = self.state.global_step
        # The figures of an earlier call, which has trained the run, say more.
        is_done = self.resumed_at_end and is_summarised(folder, self.run_id, step)
        with guard(SUMMARY_FILE):
            if not is_done:
                self._write_summary(folder, output, wall_seconds)
        with guard(PLOT_FILE):
            title = f"DPO: {public_name(folder) or 'training'}"  # may be published with the card
            plot_run(self.state.log_history, folder / PLOT_FILE, title)
            self.plot_file = folder / PLOT_FILE

    def _write_summary(self, folder: Path, output: TrainOutput, wall_seconds: float) -> None:
        write_summary(
            folder,
            output,
            self.state,
            run_id=self.run_id,
            resumed_at_end=self.resumed_at_end,
            first_loss=self.first_loss,
            pairs_trained=self.pairs_trained,
            pairs_before=self.pairs_before,
            throughput=self.throughput.summary(),
            wall_seconds=wall_seconds,
            run=self.run_summary(),
        )

    def run_summary(self) -> dict[str, Any]:
        """Facts about the run so far: reference, data, settings, memory, versions, hardware."""
        given = self.train_dataset
        plan = None if given is None else prepare_training_set(self.data, given).plan
        return run_summary(
            self.user_args,
            self.loaders,
            self.data.datasets,
            plan,
            self.pair_loss,
            self.data.likelihood,
            self.accelerator.mixed_precision,
        )
