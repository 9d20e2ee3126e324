"""All options of a run, checked when they are given: before models or data are loaded."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_torch_bf16_gpu_available

from dpofast.data.packing.collate import LAYOUTS
from dpofast.data.tokens.truncate import TRUNCATION_MODES
from dpofast.errors import ConfigError
from dpofast.options.foreign import refuse_unknown_options
from dpofast.reference.store.location import default_folder
from dpofast.reference.store.row_detail import DETAILS, Detail
from dpofast.zero.batch import ShownBatch, settle_deepspeed
from dpofast.zero.config import read_deepspeed
from dpofast_kernels import PairLoss, make_loss

DEFAULT_MAX_LENGTH = 1024


@dataclass
class DPOConfig(TrainingArguments):
    """transformers' TrainingArguments and the options of DPO; names and defaults as in TRL.

    Attributes:
        model_init_kwargs: for `from_pretrained`, where the model is given by name. Without a
            `dtype` there it is loaded in float32.
        trust_remote_code: run code that a model's repository brings along.
        beta: strength of the KL penalty, above 0 (for ipo its regularisation tau).
        loss_type: sigmoid, hinge or ipo; a list of one is taken, too.
        label_smoothing: probability that a pair's labels are swapped, in [0, 0.5); with sigmoid
            only (conservative DPO).
        max_length: tokens of prompt + answer; None for no limit.
        truncation_mode: keep_start cuts longer sequences on the right; keep_end first cuts the
            prompt from its left, once for the pair.
        router_aux_loss_coef: what the auxiliary loss of a mixture of experts' routers is multiplied
            with; None for what the model's config says, 0 to leave that loss out.
        disable_dropout: set every dropout of the policy to 0.
        dataset_num_proc: processes that tokenise.
        precompute_ref_log_probs: keep the reference's log-probs for later runs. They are computed
            once in any case; False puts them into a temporary folder.
        precompute_ref_batch_size: pairs in a forward pass of the reference. By default as many
            answers as fit a packed row; where rows are padded, per_device_train_batch_size pairs.
        reference_store: folder of the reference's log-probs; by default `dpofast/reference`
            in Hugging Face's cache (HF_HOME).
        reference_store_detail: what is stored of each answer: "sums" (its summed log-prob, all that
            training needs), "logps" (and each token's log-prob), or "logsumexps" (and the
            log-sum-exp of the logits at each token). Training takes any row that is there; `dpofast
            ref build` scores those again that lack what this asks for.
        layout: how micro-batches are laid out: "shared" (packed into a row without padding, with
            what the two sequences of a pair begin with once), "unshared" (packed, each sequence for
            itself), "padded" (a row for each sequence), or "auto": shared wherever that is right
            for the model. All of them train the same.
        max_tokens_per_microbatch: tokens of a packed micro-batch; a longer pair has one of its own.
            By default 2,048 on a CPU, and on a GPU as many as fit its memory.
        strict: stop at rows that would be reported and left out.
        pad_token: sets the tokenizer's pad token.

    Raises:
        ConfigError: an option that does not exist, with the nearest that does; a value that can't
            be used.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every X optimizer steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and inf losses in the logs."}
    )
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in the backward pass."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 autocast; the default where fp16 isn't set."}
    )
    report_to: list[str] | str | None = field(
        default="tensorboard", metadata={"help": "Where logs go; 'none' for files alone."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a model."}
    )
    beta: float = field(default=0.1, metadata={"help": "Strength of the KL penalty."})
    loss_type: list[str] | str = field(
        default_factory=lambda: ["sigmoid"], metadata={"help": "sigmoid, hinge or ipo."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Probability of swapped labels (cDPO), below 0.5."}
    )
    max_length: int | None = field(
        default=DEFAULT_MAX_LENGTH,
        metadata={"help": "Tokens of prompt + answer; None for no limit."},
    )
    truncation_mode: str = field(default="keep_start", metadata={"help": "keep_start or keep_end."})
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of the routers' auxiliary loss; 0 for none."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set every dropout of the policy to 0."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise."}
    )
    precompute_ref_log_probs: bool = field(
        default=True, metadata={"help": "Keep the reference's log-probs for later runs."}
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs in a forward pass of the reference."}
    )
    reference_store: str | None = field(
        default=None, metadata={"help": "Folder of the reference's log-probs."}
    )
    reference_store_detail: str = field(
        default="logps", metadata={"help": "What is stored of answers: sums, logps or logsumexps."}
    )
    layout: str = field(
        default="auto", metadata={"help": "auto, shared, unshared (both packed) or padded."}
    )
    max_tokens_per_microbatch: int | None = field(
        default=None, metadata={"help": "Tokens of a packed micro-batch."}
    )
    strict: bool = field(default=False, metadata={"help": "Stop at rows that would be left out."})
    pad_token: str | None = field(default=None, metadata={"help": "The tokenizer's pad token."})

    def __post_init__(self) -> None:
        if self.bf16 is None:
            # on a machine without a GPU, only for those who ask for its CPU
            self.bf16 = not self.fp16 and (self.use_cpu or is_torch_bf16_gpu_available())
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._name_checkpointing()
        self._read_model_init_kwargs()
        self._check_numbers()
        self.make_loss()
        self._check_unsupported()
        self._post_init_with_deepspeed()
        if self.n_gpu > 1:
            raise ConfigError(
                f"{self.n_gpu} GPUs are visible to one process; launch with torchrun "
                "--nproc-per-node, or choose one with CUDA_VISIBLE_DEVICES."
            )

    def _post_init_with_deepspeed(self) -> None:
        """The parent's, with a DeepSpeed configuration that it can read and ours has checked."""
        given: Any = self.deepspeed  # type: ignore[has-type]
        if given:
            self.deepspeed = read_deepspeed(given)
        try:
            super().__post_init__()
        finally:
            self.deepspeed = given  # what logs and checkpoints show
        if self.deepspeed_plugin is not None:
            settle_deepspeed(self)

    def _name_checkpointing(self) -> None:
        """transformers 5.23 renamed the option: both names are taken, and neither is warned of."""
        for suffix in ("checkpointing", "checkpointing_kwargs"):
            if getattr(self, f"activation_{suffix}", ...) is None:
                setattr(self, f"activation_{suffix}", getattr(self, f"gradient_{suffix}"))

    def _read_model_init_kwargs(self) -> None:
        options = self.model_init_kwargs
        if isinstance(options, str):
            try:
                options = json.loads(options)
            except ValueError as error:
                raise ConfigError(
                    f"model_init_kwargs: got {options!r}, expected a mapping or one as JSON."
                ) from error
        if options is not None and not isinstance(options, dict):
            raise ConfigError(f"model_init_kwargs: got {options!r}, expected a mapping.")
        if options and "torch_dtype" in options:  # its name of old
            options = dict(options)
            options.setdefault("dtype", options.pop("torch_dtype"))
        self.model_init_kwargs = options

    def make_loss(self) -> PairLoss:
        """The loss that these options name, of `dpofast_kernels.preference`."""
        if not isinstance(self.loss_type, (list, tuple)) or len(self.loss_type) != 1:
            raise ConfigError(
                f"loss_type: got {self.loss_type}, but one loss is trained at a time; name one."
            )
        try:
            return make_loss(self.loss_type[0], self.beta, self.label_smoothing)
        except (TypeError, ValueError) as error:
            named = "loss_type: " if str(error).startswith("Unknown loss") else ""
            raise ConfigError(f"{named}{error}") from error

    def loading_options(self) -> dict[str, Any]:
        """What `from_pretrained` gets, for policy and reference alike."""
        own = self.model_init_kwargs
        assert own is None or isinstance(own, dict)
        return {"trust_remote_code": self.trust_remote_code, **(own or {})}

    def reference_folder(self) -> Path | None:
        """Where the reference's log-probs are kept; None if they aren't to be."""
        if not self.precompute_ref_log_probs:
            return None
        if self.reference_store is not None:
            return Path(self.reference_store).expanduser()
        return default_folder()

    def reference_detail(self) -> Detail:
        """What is stored of each answer that a run scores."""
        return Detail(DETAILS.index(self.reference_store_detail))

    @contextlib.contextmanager
    def one_item_per_step(self) -> Iterator[None]:
        """Inside, the Trainer's loop takes one item of its loader for one optimizer step.

        An item holds all micro-batches of the step, so the loop must not accumulate on top, nor may
        DeepSpeed. Logs and checkpoints go on to show the values that the user gave.
        """
        pairs_per_rank = self.per_device_train_batch_size * self.accumulation
        self._shown_accumulation: int = self.gradient_accumulation_steps  # type: ignore[has-type]
        self.gradient_accumulation_steps = 1
        self._shown_batch = ShownBatch(self.deepspeed_plugin, pairs_per_rank, self.world_size)
        try:
            with self._shown_batch.one_item():
                yield
        finally:
            self.gradient_accumulation_steps = self._shown_accumulation
            del self._shown_accumulation, self._shown_batch

    @property
    def accumulation(self) -> int:
        """gradient_accumulation_steps as the user gave it, also while the Trainer's loop runs."""
        return getattr(self, "_shown_accumulation", self.gradient_accumulation_steps)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "gradient_accumulation_steps": self.accumulation}

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "gradient_accumulation_steps": self.accumulation}
        state.pop("_shown_accumulation", None)
        shown_batch = state.pop("_shown_batch", None)
        return state if shown_batch is None else {**state, **shown_batch.as_shown()}

    def _check_numbers(self) -> None:
        ranges = {
            "beta": (0.0, "above 0"),
            "label_smoothing": (None, "at least 0 and below 0.5"),
            "learning_rate": (0.0, "at least 0"),
            "num_train_epochs": (0.0, "above 0"),
            "router_aux_loss_coef": (0.0, "at least 0"),
        }
        for name, (minimum, words) in ranges.items():
            value = getattr(self, name)
            if value is None and name == "router_aux_loss_coef":
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or (minimum is not None and value < minimum):
                raise ConfigError(f"{name}: got {value!r}, expected a number {words}.")
        if not self.num_train_epochs or not self.max_steps:
            raise ConfigError(
                f"num_train_epochs: got {self.num_train_epochs!r}, with max_steps "
                f"{self.max_steps!r}: nothing would be trained; give one of them a number above 0."
            )
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ConfigError(
                f"truncation_mode: got {self.truncation_mode!r}, expected one of "
                f"{TRUNCATION_MODES}."
            )
        if self.reference_store_detail not in DETAILS:
            raise ConfigError(
                f"reference_store_detail: got {self.reference_store_detail!r}, expected one of "
                f"{DETAILS}."
            )
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout: got {self.layout!r}, expected one of {LAYOUTS}.")
        minima = {
            "max_length": 2,  # a token of the prompt and one of the answer
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "precompute_ref_batch_size": 1,
            "max_tokens_per_microbatch": 1,
            "dataset_num_proc": 1,
            "seed": 0,
        }
        for name, minimum in minima.items():
            value = getattr(self, name)
            is_int = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (is_int and value >= minimum):
                raise ConfigError(f"{name}: got {value!r}, expected a whole number >= {minimum}.")

    def _check_report_to(self) -> None:
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        usable = {"all", "none", *get_available_reporting_integrations()}
        for name in names:
            if name not in usable:
                raise ConfigError(
                    f"report_to: {name!r} is unknown or not installed here; choose among "
                    f"{', '.join(sorted(usable))}."
                )

    def _check_unsupported(self) -> None:
        if self.auto_find_batch_size:
            raise ConfigError(
                "auto_find_batch_size isn't supported, as it would change the pairs of a step; "
                "lower per_device_train_batch_size and raise gradient_accumulation_steps."
            )
        if self.fp16_full_eval or self.bf16_full_eval:
            raise ConfigError(
                "fp16_full_eval and bf16_full_eval aren't supported, as the policy would be "
                "compared with a reference in another precision; use fp16 or bf16."
            )
        remedies = {
            "label_smoothing_factor": "set label_smoothing",
            "neftune_noise_alpha": "leave it out; the policy would differ from its reference",
            "use_liger_kernel": "leave it out; only dpofast's own kernels are supported yet",
            "parallelism_config": "leave it out; ranks share a step's pairs, not a sequence",
            **dict.fromkeys(
                ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
                "leave it out; rows differ in every step, and would compile each time",
            ),
            "fsdp": "set deepspeed to zero2 or zero3, which spread gradients and weights likewise",
        }
        for name, remedy in remedies.items():
            if getattr(self, name, None):
                raise ConfigError(f"{name} isn't supported: {remedy}.")
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise ConfigError("accelerate launch --use_fsdp isn't supported: use --use_deepspeed.")
        if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
            raise ConfigError(
                "accelerate launch --dynamo_backend isn't supported: set it to no; rows differ in "
                "every step, and would compile each time."
            )
        self._check_report_to()
        strategy = self.train_sampling_strategy
        if strategy not in ("random", "sequential"):
            raise ConfigError(
                f"train_sampling_strategy: got {strategy!r}, expected 'random' or 'sequential'."
            )


@functools.cache
def option_names() -> frozenset[str]:
    """Names of the options that a DPOConfig takes."""
    return frozenset(item.name for item in fields(DPOConfig) if item.init)


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked_init(self: DPOConfig, *args: Any, **options: Any) -> None:
        init(self, *args, **refuse_unknown_options(options, option_names()))

    return checked_init


# The generated __init__ would answer an unknown option with a bare TypeError.
DPOConfig.__init__ = _checked(DPOConfig.__init__)  # type: ignore[method-assign]
