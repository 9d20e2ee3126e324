"""DPOTrainer: transformers' Trainer wired to the pair loss and the stored reference log-probs."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput

from dpofast.data.packing.batch import PackedPairs, StepBatch
from dpofast.errors import ConfigError
from dpofast.model.attention import packed_attention
from dpofast.model.dropout import dropouts
from dpofast.model.forward import evaluating, pair_step, run_batch
from dpofast.model.head import PairLossTask, head_options
from dpofast.model.packable import choose_layout
from dpofast.model.parts import causal_lm
from dpofast.model.router import add_router_loss, make_router_loss
from dpofast.monitor.callbacks import MetricsFile
from dpofast.monitor.metrics import MetricSums
from dpofast.monitor.plots import PLOT_FILE, plot_run
from dpofast.monitor.throughput import Throughput
from dpofast.options.config import DPOConfig
from dpofast.options.trl import refuse, resolve_config, resolve_tokenizer
from dpofast.reference.build.provider import Ranks, ReferenceProvider
from dpofast.train.checkpoint.resume import refuse_finished, resolve_checkpoint
from dpofast.train.checkpoint.run_state import load_run_state
from dpofast.train.clipping import ClipsExactly
from dpofast.train.dataset import PreparedData
from dpofast.train.loaders import StepLoader, StepLoaders, whole_step
from dpofast.train.memory import free_device_bytes, tokens_that_fit
from dpofast.train.policy import model_name, prepare_policy, resolve_model, resolve_ref_model
from dpofast.train.reference import RunReference
from dpofast.train.sampler import planned_steps, train_sampler
from dpofast.train.step_zero import StepZeroCheck
from dpofast.train.summary import write_summary
from dpofast.zero.blocks import runnable
from dpofast_kernels import METRIC_NAMES, PairLossOutput

logger = logging.getLogger(__name__)


class DPOTrainer(ClipsExactly, Trainer):
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

    The signature is TRL's. Where no `ref_model` is given the reference is the policy as it stands
    before step 1, with a fresh adapter that is the model below it. Its log-probs are made once,
    kept in the reference store, and read from there by this run and all later ones.

    Args:
        model: causal LM, PeftModel, or the folder or hub name of a causal LM.
        ref_model: reference model; never trained.
        args: options.
        train_dataset: preference pairs in any form that `load_preferences` reads.
        eval_dataset: held-out pairs, or a dict of several named sets.
        processing_class: tokenizer; by default the one beside the model.
        callbacks: further callbacks of transformers.
        optimizers: optimizer and scheduler, made by the Trainer where None.
        peft_config: wraps the model in a fresh adapter.
        options: arguments of old TRL versions: `tokenizer`, and options such as beta.

    Raises:
        ConfigError, DataError, ModelError, ReferenceStoreError: all ValueErrors, with the remedy.
    """

    args: DPOConfig
    control: TrainerControl
    _step_zero: StepZeroCheck | None  # until the first batch of a fresh run

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
        **options: Any,
    ) -> None:
        refuse("data_collator", data_collator, "leave it out; batches are laid out by the trainer")
        refuse("compute_metrics", compute_metrics, "no logits exist to give it; use a callback")
        refuse("quantization_config", quantization_config, "load the model in bfloat16")
        processing_class = resolve_tokenizer(processing_class, options)
        config = resolve_config(args, options, model_name(model))
        set_seed(config.seed)  # a fresh adapter's weights are random
        ref_model = resolve_ref_model(ref_model, model, config)
        model, tokenizer = resolve_model(model, config, processing_class)
        model = prepare_policy(model, config, peft_config)
        self.pair_loss = config.make_loss()
        self.data = PreparedData(config, tokenizer, (model, ref_model))
        self._start_counting()
        super().__init__(
            model=model,
            args=config,
            data_collator=whole_step,
            train_dataset=self.data.prepare(train_dataset, "train"),
            eval_dataset=self.data.prepare_sets(eval_dataset, "eval"),
            processing_class=tokenizer,
            callbacks=[MetricsFile(), *(callbacks or [])],
            optimizers=optimizers,
        )
        self._lm_config = causal_lm(self.model).config
        self._head_options = head_options(self._lm_config)
        self.layout = choose_layout(config.layout, self.model, self._pad_token_id)
        self._router_loss = make_router_loss(self.model, config)
        ranks = Ranks(config.process_index, config.world_size, self.accelerator.wait_for_everyone)
        pairs = config.precompute_ref_batch_size or config.per_device_train_batch_size
        self.ref_model = ref_model
        detail = config.reference_detail()
        self.reference = RunReference(
            self.model,
            ref_model,
            ReferenceProvider(config.reference_folder(), ranks, detail),
            self.accelerator,
            self.layout,
            num_answers=2 * pairs,
            router_loss=self._router_loss,
        )
        self.loaders = StepLoaders(config, self.layout, self.reference, self._tokens_that_fit)
        self.throughput = Throughput(
            self.model, self.reference.dtype(), config.device, config.world_size
        )

    # Data

    @property
    def _pad_token_id(self) -> int:
        ids = (self.processing_class.pad_token_id, self.processing_class.eos_token_id)
        return next((token for token in ids if token is not None), 0)

    def _tokens_that_fit(self) -> int:
        """Tokens of a packed row in this run's GPU memory; the least of all ranks."""
        autocast = self.accelerator.autocast
        with runnable(self):
            free = free_device_bytes(self.args.device)
            tokens = tokens_that_fit(self.model, self.layout, self.args, autocast, free)
        own = torch.tensor([tokens], device=self.args.device)
        return int(self.accelerator.gather(own).min())

    def get_train_dataloader(self) -> StepLoader:
        """One item is one step. Not prepared by accelerate, which would shard it again."""
        return self.loaders.train(self._train_pairs())

    def _train_pairs(self) -> Any:
        if self.train_dataset is None:
            raise ConfigError("DPOTrainer: train() needs a train_dataset.")
        return self.train_dataset

    def get_eval_dataloader(self, eval_dataset: Any = None) -> StepLoader:
        name = eval_dataset if isinstance(eval_dataset, str) else "eval"
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            pairs = self.eval_dataset[eval_dataset]
        if pairs is None:
            raise ConfigError("DPOTrainer: evaluate() needs an eval_dataset.")
        return self.loaders.evaluation(pairs, name)

    def get_test_dataloader(self, test_dataset: Any) -> StepLoader:
        return self.get_eval_dataloader(self.data.prepare(test_dataset, "test"))

    # Training

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers' Trainer; resuming takes the newest whole checkpoint for `True`.

        Raises:
            ReferenceStoreError: reference log-probs are missing and can't be made.
            ConfigError: nothing to resume from.
        """
        started = time.monotonic()
        self._start_counting()
        epoch = train_sampler(self.args, len(self._train_pairs()), None)
        total_steps = planned_steps(self.args, epoch)
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            refuse_finished(checkpoint, total_steps)
            recorded = load_run_state(checkpoint)
            self.loaders.resume(recorded.row_tokens)
            if self.reference.restore(recorded, checkpoint):
                self.loaders.forget_references()  # of the model given, not of the run's start
        self._score_references()
        if checkpoint is None:
            self._step_zero = self._step_zero_check()
        self.reference.policy_moves()
        with self.args.one_item_per_step():
            output = super().train(checkpoint, *args, **kwargs)
        if self.is_world_process_zero():
            write_summary(self, output, time.monotonic() - started)
            folder = Path(self.args.output_dir)
            plot_run(self.state.log_history, folder / PLOT_FILE, f"DPO: {folder.name}")
        return output

    def _start_counting(self) -> None:
        self.first_loss: float | None = None  # of this call's first step
        self.pairs_trained = 0
        self._metric_sums = MetricSums()
        self._tokens = 0
        self._step_zero = None

    def _score_references(self) -> None:
        """All that this run will read, before the policy moves."""
        _ = self.reference.identity
        self.loaders.dataset(self.train_dataset, "train")
        sets = self.eval_dataset
        if sets is not None:
            for name, pairs in (sets if isinstance(sets, dict) else {"eval": sets}).items():
                self.loaders.dataset(pairs, name)

    def _step_zero_check(self) -> StepZeroCheck | None:
        """None where the policy needn't begin with zero log-ratios."""
        if next(dropouts(self.model), None) or not self.reference.policy_starts_as_reference():
            return None
        return StepZeroCheck(self.pair_loss, self.reference.dtype())

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            "hyperparameter_search isn't supported; run dpofast once per setting: the stored "
            "reference log-probs serve all of them."
        )

    def training_step(
        self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of a whole step; ranks synchronise in its last micro-batch."""
        is_deepspeed = self.is_deepspeed_enabled
        # DeepSpeed would divide the loss by its own accumulation steps; it is a mean already.
        options = {"scale_wrt_gas": False} if is_deepspeed else {}
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        # DDP and ZeRO average gradients over ranks: this makes them those of the mean over the
        # step's pairs, however they are spread.
        scale = self.args.world_size / inputs.num_pairs
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self.throughput.start_step()
        last = len(inputs.micro_batches) - 1
        for index, batch in enumerate(inputs.micro_batches):
            self.accelerator.gradient_state._set_sync_gradients(index == last)
            defer = index < last and not is_deepspeed
            attention = packed_attention(self._lm_config, batch.shared_layout)
            with attention, self.accelerator.no_sync(model) if defer else contextlib.nullcontext():
                output = self.compute_pair_loss(model, batch, self._metric_sums)
                if self._step_zero is not None and batch.num_pairs:
                    self._step_zero.check(output, batch)
                    self._step_zero = None
                loss = output.loss * scale
                self.accelerator.backward(loss, **options)
            total = total + loss.detach()
            self._tokens += batch.num_tokens
            self.throughput.add(batch)
        self.pairs_trained += inputs.num_pairs
        if self.first_loss is None:
            self.first_loss = self._sum_over_ranks(total).item() / self.args.world_size
        return total

    def compute_pair_loss(
        self, model: nn.Module, batch: PackedPairs, sums: MetricSums
    ) -> PairLossOutput:
        """One forward pass: the sum of the losses over the batch's pairs, metrics into `sums`."""
        batch = batch.to(self.args.device)
        assert batch.ref_logps is not None
        task = PairLossTask(
            batch.labels, batch.bounds, batch.ref_logps, self.pair_loss, self._head_options
        )
        attention = packed_attention(self._lm_config, batch.shared_layout)
        with attention, pair_step(self.model), self.accelerator.autocast():
            results = run_batch(model, batch, task, self._router_loss)
        output, more = add_router_loss(results, self._router_loss, batch.num_pairs)
        metrics = dict(zip(METRIC_NAMES, output.metrics, strict=True))
        sums.add({**metrics, **more, "loss": output.loss}, batch.num_pairs)
        return output

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("The loss is computed by compute_pair_loss.")

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Exact means over the pairs of all ranks; a dict of datasets gives one set each.

        A text is the name of one of the trainer's own sets.
        """
        if isinstance(eval_dataset, str):
            own = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if eval_dataset not in own:
                raise ConfigError(
                    f"evaluate: there is no set {eval_dataset!r} among the trainer's "
                    f"({', '.join(own) or 'none is named'}); pass a dataset, or one of these names."
                )
        elif eval_dataset is not None:
            eval_dataset = self.data.prepare_sets(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: StepLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.callback_handler.eval_dataloader = dataloader
        sums = MetricSums()
        with runnable(self), evaluating(self.model):
            for step in dataloader:
                for batch in step.micro_batches:
                    self.compute_pair_loss(self.model, batch, sums)
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        means = sums.means(self._sum_over_ranks, self.args.device)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics=metrics,
            num_samples=len(dataloader.dataset),  # type: ignore[arg-type]
        )

    def _sum_over_ranks(self, vector: Tensor) -> Tensor:
        return self.accelerator.reduce(vector, reduction="sum")

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and "learning_rate" in logs:  # of training, not of evaluation
            means = self._metric_sums.means(self._sum_over_ranks, self.args.device)
            self._count_tokens()
            # The Trainer's own loss is summed in float32; this one is the exact mean over pairs.
            speed = self.throughput.metrics(self._sum_over_ranks)
            logs = {**logs, **means, **speed, "num_tokens": self.state.num_input_tokens_seen}
        super().log(logs, start_time)

    def _count_tokens(self) -> None:
        tokens = torch.tensor(self._tokens, device=self.args.device)
        self.state.num_input_tokens_seen += int(self._sum_over_ranks(tokens))
        self._tokens = 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._count_tokens()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            state = self.reference.run_state(kept=self.args.precompute_ref_log_probs)
            replace(state, row_tokens=self.loaders.row_tokens).save(folder)
        super()._save_checkpoint(model, trial)

    # What the Trainer would look for in a dict of tensors, and an item is a whole step

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return int(args.per_device_train_batch_size * self.args.accumulation * args.world_size)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        pass

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        return None
