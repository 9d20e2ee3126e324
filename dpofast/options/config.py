"""All options of a run, checked when they are given: before models or data are loaded."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_torch_bf16_gpu_available

from dpofast.data.packing.collate import LAYOUTS
from dpofast.data.reading.bad_rows import check_strictness
from dpofast.data.tokens.truncate import TRUNCATION_MODES, LengthLimits
from dpofast.errors import ConfigError
from dpofast.options.foreign import refuse_unknown_options
from dpofast.options.quantisation import OPTION, quantisation_options
from dpofast.reference.store.location import default_folder
from dpofast.reference.store.row_detail import DETAILS, RowDetail
from dpofast.zero.batch import settle_deepspeed
from dpofast.zero.config import read_deepspeed
from dpofast_kernels import PairLoss, make_loss

DEFAULT_MAX_LENGTH = 1024


@dataclass
class DPOConfig(TrainingArguments):
    """transformers' TrainingArguments and the options of DPO; names and defaults as in TRL.

    Attributes:
        model_init_kwargs: arguments of `from_pretrained`, used if the model is given by name. The
            model is loaded in float32 unless they name a `dtype`.
        trust_remote_code: run code that comes with a model's repository.
        beta: strength of the KL penalty, above 0; for ipo the regularisation tau.
        loss_type: sigmoid, hinge or ipo; a list of one name is accepted as well.
        label_smoothing: probability that a pair's labels are swapped, in [0, 0.5). It needs the
            sigmoid loss (conservative DPO).
        max_length: most tokens of a prompt and one answer; None for no limit.
        max_prompt_length: most tokens of a prompt; None for no limit.
        max_completion_length: most tokens of an answer; None for no limit.
        max_target_length: an older name of max_completion_length.
        truncation_mode: keep_start cuts longer sequences on their right. keep_end first cuts the
            prompt on its left, equally for both answers.
        router_aux_loss_coef: weight of the auxiliary loss of a mixture of experts' routers. None
            takes the weight in the model's config, 0 leaves the loss out.
        disable_dropout: set every dropout of the policy to 0, and switch off its routers' noise.
        dataset_num_proc: number of processes that tokenise.
        precompute_ref_log_probs: keep the reference log-probs for later runs. They are computed
            once in any case; False writes them to a temporary folder.
        precompute_ref_batch_size: pairs in a forward pass of the reference. The default is as many
            answers as fit a packed row, or per_device_train_batch_size pairs where rows are padded.
        reference_store: folder of the reference log-probs. The default is `dpofast/reference` in
            Hugging Face's cache (HF_HOME).
        reference_store_detail: what is stored of each answer: "sums" (its summed log-prob, which
            is all that training needs), "logps" (also the log-prob of each token) or "logsumexps"
            (also the log-sum-exp of the logits at each token). Training reads answers stored in any
            detail. `dpofast ref build` scores answers again if they are stored with less detail.
        layout: how sequences become micro-batches. "shared" packs them into one row without
            padding, in which the common beginning of a pair's two sequences occurs once.
            "unshared" packs them without sharing. "padded" gives each sequence a row of its own.
            "auto" means "shared" if that is right for the model, otherwise "padded". The layout
            changes speed and memory, not what is trained.
        max_tokens_per_microbatch: most tokens of a packed micro-batch; a pair that is longer gets
            a micro-batch of its own. The default is 2,048 on a CPU, and on a GPU as many as fit
            its memory.
        strict: stop at a pair that would otherwise be reported and left out.
        skip_bad_rows: leave out and report rows of the data that can't be used. By default, such
            rows are an error.
        pad_token: the tokenizer's pad token.

    Raises:
        ConfigError: an option that does not exist, with the nearest one that does; or a value that
            can't be used.
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
        default="tensorboard", metadata={"help": "Where logs go; 'none' for files only."}
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
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens of a prompt, which is cut on its left."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Tokens of an answer, which is cut on its right."}
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "An older name of max_completion_length."}
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
    strict: bool = field(default=False, metadata={"help": "Stop at pairs that would be left out."})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out rows that can't be used, and report them."}
    )
    pad_token: str | None = field(default=None, metadata={"help": "The tokenizer's pad token."})

    def __post_init__(self) -> None:
        if self.bf16 is None:
            # Without a GPU that supports bfloat16, it is the default only if use_cpu is set.
            self.bf16 = not self.fp16 and (self.use_cpu or is_torch_bf16_gpu_available())
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._name_checkpointing()
        self._read_model_init_kwargs()
        self._check_values()
        self.make_loss()
        self._check_unsupported()
        self._post_init_with_deepspeed()
        if self.n_gpu > 1:
            raise ConfigError(
                f"{self.n_gpu} GPUs are visible to one process; launch with torchrun "
                "--nproc-per-node, or choose one with CUDA_VISIBLE_DEVICES."
            )

    def _post_init_with_deepspeed(self) -> None:
        """Run the parent's __post_init__ with our own reading of the DeepSpeed configuration.

        `read_deepspeed` turns a name or a path into a checked dict, which the parent class gets in
        place of what the user gave.
        """
        given: Any = self.deepspeed  # type: ignore[has-type]
        if given:
            self.deepspeed = read_deepspeed(given)
        try:
            super().__post_init__()
        finally:
            self.deepspeed = given  # logs and checkpoints show what the user gave
        if self.deepspeed_plugin is not None:
            settle_deepspeed(self)

    def _name_checkpointing(self) -> None:
        """Accept both names of gradient checkpointing, which transformers 5.23 renamed.

        DPOConfig sets a default under the old name. transformers would warn about that name if the
        new one were empty, so the value is copied to the new one.
        """
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
        if options and "torch_dtype" in options:  # the old name of dtype
            options = dict(options)
            options.setdefault("dtype", options.pop("torch_dtype"))
        if options and options.get(OPTION) is not None:
            options = {**options, OPTION: quantisation_options(options[OPTION])}
        self.model_init_kwargs = options

    def make_loss(self) -> PairLoss:
        """The pair loss that these options name.

        Raises:
            ConfigError: an unknown name, more than one, or a parameter out of range.
        """
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
        """The arguments of `from_pretrained`, the same for policy and reference."""
        own = self.model_init_kwargs
        assert own is None or isinstance(own, dict)
        return {"trust_remote_code": self.trust_remote_code, **(own or {})}

    def length_limits(self) -> LengthLimits:
        """What decides how pairs are cut."""
        answer, older = self.max_completion_length, self.max_target_length
        if None not in (answer, older) and answer != older:
            raise ConfigError(
                f"max_target_length is an older name of max_completion_length, but they are "
                f"{older} and {answer}; set only one of them."
            )
        answer = older if answer is None else answer
        return LengthLimits(self.max_length, self.truncation_mode, self.max_prompt_length, answer)

    @property
    def pairs_per_rank(self) -> int:
        """Most pairs that one rank runs in an optimizer step."""
        return int(self.per_device_train_batch_size * self.gradient_accumulation_steps)

    def reference_folder(self) -> Path | None:
        """The folder in which reference log-probs are kept; None if they aren't kept."""
        if not self.precompute_ref_log_probs:
            return None
        if self.reference_store is not None:
            return Path(self.reference_store).expanduser()
        return default_folder()

    def reference_detail(self) -> RowDetail:
        """How much is stored of each answer that a run scores."""
        return RowDetail(DETAILS.index(self.reference_store_detail))

    def _check_values(self) -> None:
        """Raise ConfigError at the first option whose value can't be used."""
        self._check_number("beta", "above 0", minimum=0.0)
        self._check_number("label_smoothing", "at least 0 and below 0.5")
        self._check_number("learning_rate", "at least 0", minimum=0.0)
        self._check_number("num_train_epochs", "above 0", minimum=0.0)
        if self.router_aux_loss_coef is not None:
            self._check_number("router_aux_loss_coef", "at least 0", minimum=0.0)
        if not self.num_train_epochs or not self.max_steps:
            raise ConfigError(
                f"num_train_epochs: got {self.num_train_epochs!r}, with max_steps "
                f"{self.max_steps!r}: nothing would be trained; give one of them a number above 0."
            )
        check_strictness(self.strict, self.skip_bad_rows)
        self._check_choice("truncation_mode", TRUNCATION_MODES)
        self._check_choice("reference_store_detail", DETAILS)
        self._check_choice("layout", LAYOUTS)
        self._check_whole("max_length", minimum=2)  # a token of the prompt and one of the answer
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "precompute_ref_batch_size",
            "max_tokens_per_microbatch",
            "dataset_num_proc",
            "max_prompt_length",
            "max_completion_length",
            "max_target_length",
        ):
            self._check_whole(name, minimum=1)
        self._check_whole("seed", minimum=0)
        self.length_limits()

    def _check_number(self, name: str, expected: str, minimum: float | None = None) -> None:
        """Raise ConfigError if an option isn't a number, or is below `minimum`.

        Other bounds, such as beta > 0, are checked where the number is used.
        """
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or (minimum is not None and value < minimum):
            raise ConfigError(f"{name}: got {value!r}, expected a number {expected}.")

    def _check_whole(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (is_whole and value >= minimum):
            raise ConfigError(f"{name}: got {value!r}, expected a whole number >= {minimum}.")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(f"{name}: got {value!r}, expected one of {choices}.")

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
    """The names of all options that DPOConfig accepts."""
    return frozenset(item.name for item in fields(DPOConfig) if item.init)


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked_init(self: DPOConfig, *args: Any, **options: Any) -> None:
        init(self, *args, **refuse_unknown_options(options, option_names()))

    return checked_init


# The generated __init__ would answer an unknown option with a bare TypeError.
DPOConfig.__init__ = _checked(DPOConfig.__init__)  # type: ignore[method-assign]
