"""DPOTrainer: transformers' Trainer wired to the pair loss and the stored reference log-probs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainingArguments, set_seed

from dpofast.data.packing.batch import PackedPairs, StepBatch
from dpofast.errors import ConfigError
from dpofast.model.kind import refuse_kinds
from dpofast.model.packable import choose_layout
from dpofast.model.router import make_router_loss
from dpofast.model.uncompiled import uncompiled
from dpofast.monitor.callbacks import MetricsFile
from dpofast.monitor.guard import guard_reporters
from dpofast.monitor.throughput import Throughput
from dpofast.monitor.vanishing import VanishingUpdates
from dpofast.options.allowed_changes import read_allowed
from dpofast.options.config import DPOConfig
from dpofast.options.trl import refuse, resolve_config, resolve_tokenizer
from dpofast.ranks.watch import watch_ranks
from dpofast.train.checks.best_metric import check_best_metric
from dpofast.train.checks.first_step import ChecksFirstStep, FirstStep
from dpofast.train.checks.noise import check_noise
from dpofast.train.checks.schedule import check_schedule
from dpofast.train.checks.step_zero import StepZeroCheck
from dpofast.train.data.dataset import PairPreparer, pairs_of
from dpofast.train.data.training_set import TrainingSet, prepare_training_set, total_steps
from dpofast.train.finite.saves import SavesOnlyFinite
from dpofast.train.finite.step_vote import VotesOnSteps
from dpofast.train.hooks.evaluates import EvaluatesPairs
from dpofast.train.hooks.overrides import NamesHooks, check_overrides
from dpofast.train.hooks.predictions import check_compute_metrics
from dpofast.train.hooks.settings import ShowsSettings
from dpofast.train.own.loss import run_loss
from dpofast.train.own.metrics import MetricsFunction, OwnMetrics
from dpofast.train.policy import (
    check_folders,
    model_name,
    pad_token_id,
    prepare_policy,
    resolve_model,
    resolve_ref_model,
    with_quantisation,
)
from dpofast.train.reference.no_reference import make_reference, without_reference
from dpofast.train.reports.logs_progress import LogsProgress
from dpofast.train.resuming.finished import ResumesAtEnd
from dpofast.train.resuming.reads_checkpoints import ReadsCheckpoints
from dpofast.train.resuming.resumes import ResumesRun
from dpofast.train.saving.checks import check_saving
from dpofast.train.saving.saves import SavesRun
from dpofast.train.signals.stops import StopsOnSignals, ends_at_signals
from dpofast.train.steps.clipping import ClipsExactly
from dpofast.train.steps.loaders import StepLoaders, whole_step
from dpofast.train.steps.loop_arguments import one_item_per_step
from dpofast.train.steps.micro_batches import PairLossPass, gradient_exchange
from dpofast.train.steps.recompute import Recomputation
from dpofast_kernels import CoupledFunction, PairFunction

logger = logging.getLogger(__name__)


class DPOTrainer(
    StopsOnSignals,
    EvaluatesPairs,
    SavesOnlyFinite,
    SavesRun,
    ResumesAtEnd,
    ResumesRun,
    ReadsCheckpoints,
    VotesOnSteps,
    ClipsExactly,
    ChecksFirstStep,
    LogsProgress,
    ShowsSettings,
    NamesHooks,
    Trainer,
):
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

    The signature is TRL's. Without a `ref_model`, the reference is the policy before step 1; a
    fresh adapter doesn't change it. The log-probs of the reference are computed once and kept in
    the reference store, where this run and all later ones read them.

    Args:
        model: causal LM, PeftModel, or the folder or hub name of a causal LM.
        ref_model: reference model; never trained.
        args: options.
        train_dataset: preference pairs in any form that `load_preferences` reads; an
            IterableDataset is a stream, which is read while the run trains.
        eval_dataset: held-out pairs, or a dict of several named sets.
        processing_class: tokenizer; by default the one that is stored with the model.
        compute_metrics: metrics of an evaluation; it gets an EvalPrediction whose predictions are
            PairPredictions of all pairs.
        callbacks: further callbacks of transformers.
        optimizers: optimizer and scheduler; transformers makes them if they are None.
        peft_config: wraps the model in a fresh adapter.
        columns: column name of dpofast -> column name in the datasets, for all of them.
        roles: role in the datasets -> system, user, assistant or tool, for all of them.
        loss_fn: a loss of your own instead of loss_type, pair by pair: (chosen log-ratios [P] fp64,
            rejected log-ratios [P] fp64, lengths [P, 2] int64) -> losses [P] fp64, differentiable.
            In a CoupledFunction, it gets all pairs of a step, which may depend on each other.
        metrics_fn: metrics of your own, logged in training and evaluation: a function of
            PairOutputs that returns a dict of names and tensors [P].
        options: arguments of old TRL versions: `tokenizer`, and options such as beta.

    docs/extending.md describes these functions, and the methods that a subclass can override.

    Raises:
        ConfigError, DataError, ModelError, ReferenceStoreError: all ValueErrors, with the remedy.
    """

    config_class: ClassVar[type[DPOConfig]] = DPOConfig
    accepted_class: ClassVar[type[DPOConfig] | None] = None  # of `args`; None for config_class
    preparer_class: ClassVar[type[PairPreparer]] = PairPreparer
    pass_class: ClassVar[type[PairLossPass]] = PairLossPass
    takes_answers: ClassVar[bool] = False  # one by one, instead of pairs
    args: DPOConfig
    control: TrainerControl
    _step_zero: StepZeroCheck | None = None  # only until a fresh run's first batch is checked

    def __init__(
        self,
        model: Any,
        ref_model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        columns: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
        loss_fn: PairFunction | CoupledFunction | None = None,
        metrics_fn: MetricsFunction | None = None,
        **options: Any,
    ) -> None:
        check_overrides(self)
        model, ref_model = uncompiled(model, "model"), uncompiled(ref_model, "ref_model")
        refuse_kinds(model, ref_model)
        refuse("data_collator", data_collator, "leave it out; batches are laid out by the trainer")
        processing_class = resolve_tokenizer(processing_class, options)
        classes = (self.config_class, self.accepted_class)
        config = resolve_config(args, options, model_name(model), *classes)
        watch_ranks(config.rank_timeout)
        config = with_quantisation(config, quantization_config, model)
        check_compute_metrics(config, compute_metrics)
        self.pair_loss = run_loss(config, loss_fn, takes_answers=self.takes_answers)
        own_metrics = None if metrics_fn is None else OwnMetrics(metrics_fn, config.device)
        check_folders(model, ref_model, config, trains=train_dataset is not None)
        if self.pair_loss.is_reference_free:
            without_reference(ref_model, config)
            ref_model = None
        ref_model = resolve_ref_model(ref_model, model, config)
        model, tokenizer = resolve_model(model, config, processing_class)
        set_seed(config.seed)  # a fresh adapter's weights are random; loading may draw numbers, too
        model = prepare_policy(model, config, peft_config)
        models = (model, ref_model)
        self.data = self.preparer_class(config, tokenizer, models, columns, roles, self.pair_loss)
        self.start_counting()
        train_set = None
        if train_dataset is not None:
            train_set = prepare_training_set(self.data, train_dataset)
        super().__init__(
            model=model,
            args=config,
            data_collator=whole_step,
            train_dataset=pairs_of(train_set),
            eval_dataset=pairs_of(self.data.prepare_sets(eval_dataset, "eval")),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=[MetricsFile(), VanishingUpdates(), *(callbacks or [])],
            optimizers=optimizers,
        )
        self._make_parts(config, ref_model, tokenizer, own_metrics)

    def _make_parts(
        self, config: DPOConfig, ref_model: Any, tokenizer: Any, own_metrics: OwnMetrics | None
    ) -> None:
        """Make what a run has around its model: the reference, the loaders and the loss."""
        self.layout = choose_layout(
            config.layout, self.model, pad_token_id(tokenizer, self.model, ref_model)
        )
        self._ref_model = ref_model
        router_loss = make_router_loss(self.model, config)
        self.reference = make_reference(
            *(self.model, ref_model, self.accelerator, self.layout, config, router_loss),
            is_used=not self.pair_loss.is_reference_free,
        )
        self.recomputation = Recomputation(self)
        measure = self.recomputation.row_tokens
        self.loaders = StepLoaders(config, self.layout, self.reference, measure)
        self._pair_loss_pass = self.pass_class(
            *(self.model, router_loss, self.accelerator.autocast, config.device, own_metrics),
            *(self.data.likelihood, config.weighting(), tuple(config.metrics or ())),
            config.head_backend,
        )
        self.throughput = Throughput(
            self.model, self.reference.dtype(), config.device, config.world_size
        )

    # Data

    def train_set(self) -> TrainingSet:
        """The training dataset, with all that the run knows about it.

        Raises:
            ConfigError: the trainer has no training dataset.
        """
        if self.train_dataset is None:
            raise ConfigError("DPOTrainer: train() needs a train_dataset.")
        return prepare_training_set(self.data, self.train_dataset)

    def score_datasets(self, rescore: bool = False) -> None:
        """Give all datasets their reference log-probs; answers missing from the store are scored.

        A stream is read up to its end, or up to the last step of the run.

        Args:
            rescore: score answers again if the store has less detail than the options ask for.

        Raises:
            ReferenceStoreError: log-probs are missing and can't be made.
        """
        self.loaders.settle()
        if self.train_dataset is not None:
            self.loaders.score_all(self.train_set(), rescore)
        for dataset in self.eval_sets().values():
            self.loaders.score(dataset, rescore)

    def get_train_dataloader(self) -> DataLoader[StepBatch]:
        """One item is one step. Not prepared by accelerate, which would shard it again."""
        train_set = self.train_set()
        # `train` has planned its steps. Whoever else asks for a loader gets one of the options as
        # they are now.
        if not self.is_in_train or train_set.plan is None:
            self.loaders.settle()
            self.loaders.begin(train_set)
        return self.loaders.training(train_set)

    # Training

    @ends_at_signals
    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as transformers' Trainer does.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest whole one of the
                run in output_dir, or "auto" for the same if there is one.
            args, kwargs: further arguments of transformers' `train`.

        Raises:
            ReferenceStoreError: reference log-probs are missing and can't be made.
            ConfigError: there is nothing to train, or checkpoints of another run are in the way.
            CheckpointError: there is no checkpoint to resume from, or another process writes to
                output_dir.
            StoppedBySignal: a signal of save_on_signal has come; a checkpoint was saved.
        """
        with self.alone_in_output_dir():
            return self._train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, resume_from_checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.monotonic()
        check_overrides(self)  # some may have been assigned since the trainer was made
        read_allowed(self.args.allow_changed)
        self.start_counting()
        train_set = self.train_set()
        num_steps = total_steps(self.args, train_set)
        # Before an older run is moved out of the way.
        check_saving(self.model, self.processing_class, self.args)
        check_best_metric(self, self._pair_loss_pass)
        check_schedule(self, num_steps)
        check_noise(self)
        checkpoint, first_step = self.resume(resume_from_checkpoint, train_set, num_steps)
        self.loaders.settle()
        self.recomputation.settle(self.loaders.row_tokens)
        if checkpoint is None:
            self.begin_afresh(train_set, num_steps)
        # Before the policy moves: it may be the reference.
        self.loaders.begin(train_set, first_step)
        for dataset in self.eval_sets().values():
            self.loaders.score(dataset)
        self._step_zero = None
        if checkpoint is None:
            self._step_zero = StepZeroCheck.of(self.model, self.reference, self.pair_loss)
        self.first_step = FirstStep(self.model, self.pair_loss, is_fresh=checkpoint is None)
        self.say_what_coupling_costs()
        self.reference.policy_moves(is_needed=train_set.has_more(first_step))
        guard_reporters(self.callback_handler.callbacks)
        self.recomputation.apply()
        given = self.args
        with one_item_per_step(given) as self.args:
            try:
                output = super().train(checkpoint, *args, **kwargs)
            finally:
                self.args = given
        self.check_finite("The trained model")  # the last step's update, which no loss has shown
        if self.is_world_process_zero():
            self.write_results(output, time.monotonic() - started)
        return output

    def training_step(
        self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run forward and backward of a whole step, and return its loss: [] fp64, no gradient.

        Args:
            model: the policy, as it is wrapped for training.
            inputs: this rank's micro-batches of the step.
            num_items_in_batch: ignored; the loss is divided by the step's pairs.

        Raises:
            ConfigError: an overridden method gave something else than a step or a loss.
        """
        if not isinstance(inputs, StepBatch):
            raise ConfigError(
                f"get_train_dataloader: an item of the loader is a {type(inputs).__name__}, but "
                "training runs whole steps; return what super().get_train_dataloader() returns."
            )
        self.training_begins()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        # DDP and ZeRO average gradients over ranks. This factor turns that average into the
        # gradient of the mean over the step's pairs, however they are spread.
        scale = self.args.world_size / inputs.num_pairs
        self._pair_loss_pass = replace(self._pair_loss_pass, upstream=scale)
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self.throughput.start_step()
        inputs = self.prepared_step(inputs)
        if self.first_step is not None:
            self.first_step.loss = self.step_loss()
            self.first_step.begin(self.optimizer.param_groups)
        self.begin_vote(inputs)
        self.couple(inputs)
        last = len(inputs.micro_batches) - 1
        for index, batch in enumerate(inputs.micro_batches):
            with gradient_exchange(self.accelerator, model, is_last=index == last):
                total = total + self._run_micro_batch(model, batch, scale)
            self.tokens_trained += batch.num_tokens
            self.throughput.add(batch)
        self.uncouple()
        self.pairs_trained += inputs.num_pairs
        if self.first_loss is None:
            self.first_loss = self.sum_over_ranks(total).item() / self.args.world_size
        return total

    def prepared_step(self, step: StepBatch) -> StepBatch:
        """The step with what its loss needs of all its pairs; nothing for a loss of pairs.

        All ranks call this, with the policy and the optimizer in training mode.
        """
        return step

    def _run_micro_batch(self, model: nn.Module, batch: PackedPairs, scale: float) -> Tensor:
        """Run forward and backward, and return `scale` times the batch's loss: [], no gradient."""
        # DeepSpeed would divide the loss by its own accumulation steps; it is a mean already.
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        with self.opened(batch):
            with self.compute_loss_context_manager():
                mean = self.compute_loss(model, batch)
            self.check_loss(mean)
            self.count(self.metric_sums, mean, batch, "compute_loss")
            output = self._computed.output
            self.note_pass(batch, mean, output)
            if self._step_zero is not None and output is not None and batch.num_pairs:
                self._step_zero.check(output, batch)
                self._step_zero = None
            if self.first_step is not None:
                self.first_step.add(output, batch, self.coupled_slopes(batch))
            loss = mean * (batch.num_pairs * scale)
            with self.names_sharded_terms():
                self.accelerator.backward(loss, **options)
        return loss.detach()
