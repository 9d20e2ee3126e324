"""All options of a run, checked when they are given: before models or data are loaded."""

from __future__ import annotations

import inspect
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from transformers.utils import is_torch_bf16_gpu_available

from dpofast.data.packing.collate import LAYOUTS
from dpofast.data.reading.bad_rows import check_strictness
from dpofast.data.tokens.truncate import TRUNCATION_MODES, LengthLimits
from dpofast.errors import ConfigError
from dpofast.options.allowed_changes import read_allowed
from dpofast.options.checkpointing import (
    AUTO,
    CHECKPOINTING_HELP,
    NEW_NAME,
    Checkpointing,
    settle_checkpointing,
)
from dpofast.options.data_fields import check_data_fields
from dpofast.options.foreign import refuse_unknown_options
from dpofast.options.head_fields import check_head_backend_name
from dpofast.options.init_kwargs import read_init_kwargs
from dpofast.options.liger import check_liger
from dpofast.options.loss_fields import LossFields, settle_loss_fields, unused_loss_options
from dpofast.options.metric_fields import settle_metrics
from dpofast.options.named_loss import LOSS_NAMES, is_unpaired
from dpofast.options.save_signals import settle_save_signals
from dpofast.options.training_fields import check_precision, check_training_fields
from dpofast.options.unsupported import check_unsupported, unused_options
from dpofast.reference.store.location import default_folder
from dpofast.reference.store.row_detail import DETAILS, RowDetail
from dpofast.zero.batch import asked_by_launcher, settle_deepspeed
from dpofast.zero.compiled import settle_operations
from dpofast.zero.config import read_deepspeed

DEFAULT_MAX_LENGTH = 1024

logger = logging.getLogger(__name__)


@dataclass
class DPOConfig(LossFields):
    """transformers' TrainingArguments and the options of DPO; names and defaults as in TRL.

    Others have classes of their own: how a run is saved, resumed and stopped (`RunFields`), which
    pairs its data make (`DataFields`), how the head is computed (`HeadFields`), what is measured
    (`MetricFields`), how beta moves (`BetaFields`), how pairs are weighted (`WeightingFields`), and
    what else decides the loss (`LossFields`). TRL's other options are fields, too (`TRLFields`).
    Those that can't change what is trained are accepted with one line in the log, and the others
    are refused.

    Attributes:
        warmup_ratio: share of all steps in which the learning rate rises; ignored if warmup_steps
            is set.
        gradient_checkpointing: recompute activations in the backward: of all layers (true), of none
            (false), or of as many as the memory of the GPU asks for (auto). On a CPU auto means
            all layers.
        model_init_kwargs: arguments of `from_pretrained`, used if the model is given by name. The
            model is loaded in float32 unless they name a `dtype`.
        ref_model_init_kwargs: arguments of `from_pretrained` for a ref_model given by name, in
            place of model_init_kwargs.
        trust_remote_code: run code that comes with a model's repository.
        beta: strength of the KL penalty, above 0; for ipo the regularisation tau.
        loss_type: name of a loss (docs/losses.md), or a list of names for a weighted sum.
        label_smoothing: probability that a pair's labels are swapped, in [0, 0.5), for the losses
            sigmoid (conservative DPO), sigmoid_norm, robust and exo_pair.
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
            is all that training needs without ld_alpha), "logps" (also the log-prob of each token)
            or "logsumexps" (also the log-sum-exp of the logits at each token). Training reads
            answers stored in any detail that it needs. `dpofast ref build` scores answers again if
            they are stored with less detail.
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
    warmup_ratio: float | None = field(
        default=None,
        kw_only=True,
        metadata={"help": "Share of all steps in which the learning rate rises."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every X optimizer steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and inf losses in the logs."}
    )
    gradient_checkpointing: Checkpointing = field(default=AUTO, metadata=CHECKPOINTING_HELP)
    if hasattr(LossFields, NEW_NAME):
        activation_checkpointing: Checkpointing | None = field(
            default=None, metadata=CHECKPOINTING_HELP
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
    ref_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        kw_only=True,
        metadata={"help": "Arguments of from_pretrained for the reference."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a model."}
    )
    beta: float = field(default=0.1, metadata={"help": "Strength of the KL penalty."})
    loss_type: list[str] | str = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"The loss: {', '.join(sorted(LOSS_NAMES))}."},
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Probability of swapped labels, below 0.5."}
    )
    max_length: int | None = field(
        default=DEFAULT_MAX_LENGTH,
        metadata={"help": "Tokens of prompt + answer; None for no limit."},
    )
    max_prompt_length: int | None = field(
        default=None,
        kw_only=True,
        metadata={"help": "Tokens of a prompt, which is cut on its left."},
    )
    max_completion_length: int | None = field(
        default=None,
        kw_only=True,
        metadata={"help": "Tokens of an answer, which is cut on its right."},
    )
    max_target_length: int | None = field(
        default=None, kw_only=True, metadata={"help": "An older name of max_completion_length."}
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

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse names that the class doesn't have; its __init__ would raise a bare TypeError."""
        parameters = inspect.signature(cls.__init__).parameters
        if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            # What changes nothing is refused here, too, as it can't be taken out of the call.
            unknown = {name: ... for name in options if name not in parameters}
            refuse_unknown_options(unknown, parameters, where=cls.__name__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.bf16 is None:
            # Without a GPU that supports bfloat16, it is the default only if use_cpu is set.
            self.bf16 = not self.fp16 and (self.use_cpu or is_torch_bf16_gpu_available())
        remarks = self._settle()
        self._post_init_with_deepspeed()
        check_precision(self)
        if self.n_gpu > 1:
            raise ConfigError(
                f"{self.n_gpu} GPUs are visible to one process; launch with torchrun "
                "--nproc-per-node, or choose one with CUDA_VISIBLE_DEVICES."
            )
        self._say(remarks)

    def check_again(self) -> None:
        """Treat options that were set as attributes since like those that are given.

        Raises:
            ConfigError: as for a new config.
        """
        self._say(self._settle())

    def _settle(self) -> list[str]:
        """Check the options and give each its usual form; one remark for each without effect."""
        settle_checkpointing(self)
        settle_loss_fields(self)
        settle_metrics(self)
        remarks = self.settle_trl_fields() + unused_options(self) + check_liger(self)
        for name in ("model_init_kwargs", "ref_model_init_kwargs"):
            setattr(self, name, read_init_kwargs(name, getattr(self, name)))
        self._check_values()
        check_training_fields(self)
        read_allowed(self.allow_changed)
        settle_save_signals(self)
        self.max_completion_length = self.length_limits().max_completion_length
        self.max_target_length = None  # so a copy may change the value
        self.make_loss()
        check_data_fields(self, is_unpaired(self))
        check_unsupported(self)
        return remarks + unused_loss_options(self)

    def _say(self, remarks: list[str]) -> None:
        said: list[str] = getattr(self, "_said", [])
        new = [remark for remark in remarks if remark not in said]
        self._said = said + new
        if new and self.process_index == 0:
            logger.warning("These options have no effect: %s.", ", ".join(new))

    def _post_init_with_deepspeed(self) -> None:
        """Run the parent's __post_init__ with our own reading of the DeepSpeed configuration.

        `read_deepspeed` turns a name or a path into a checked dict, which the parent class gets in
        place of what the user gave.
        """
        given: Any = self.deepspeed  # type: ignore[has-type]
        if given:
            self.deepspeed = read_deepspeed(given)
        if given or asked_by_launcher():
            settle_operations()
        try:
            super().__post_init__()
        finally:
            self.deepspeed = given  # logs and checkpoints show what the user gave
        if self.deepspeed_plugin is not None:
            settle_deepspeed(self)

    def loading_options(self) -> dict[str, Any]:
        """The arguments of `from_pretrained`, the same for policy and reference."""
        own = self.model_init_kwargs
        assert own is None or isinstance(own, dict)
        return {"trust_remote_code": self.trust_remote_code, **(own or {})}

    def ref_loading_options(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` for a reference that is given by name."""
        own = self.ref_model_init_kwargs
        if own is None:
            return self.loading_options()
        assert isinstance(own, dict)
        return {"trust_remote_code": self.trust_remote_code, **own}

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """The steps in which the learning rate rises: warmup_steps, or else warmup_ratio of all."""
        if self.warmup_steps or not self.warmup_ratio:
            return int(super().get_warmup_steps(num_training_steps))
        return math.ceil(num_training_steps * self.warmup_ratio)

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
        self._check_number("rank_timeout", "of seconds, 0 for never", minimum=0.0)
        if self.warmup_ratio is not None:
            self._check_number("warmup_ratio", "from 0 to 1", minimum=0.0, maximum=1.0)
            if self.warmup_ratio and self.optim in ("schedule_free_adamw", "schedule_free_sgd"):
                raise ConfigError(f"warmup_ratio: {self.optim} needs a number; set warmup_steps.")
        if self.router_aux_loss_coef is not None:
            self._check_number("router_aux_loss_coef", "at least 0", minimum=0.0)
        # transformers takes max_steps only if it is above 0, and then ignores the epochs.
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs):
            raise ConfigError(
                f"num_train_epochs: got {self.num_train_epochs!r}, with max_steps "
                f"{self.max_steps!r}: nothing would be trained; give one of them a number above 0."
            )
        check_strictness(self.strict, self.skip_bad_rows)
        self._check_choice("truncation_mode", TRUNCATION_MODES)
        self._check_choice("reference_store_detail", DETAILS)
        self._check_choice("layout", LAYOUTS)
        check_head_backend_name(self)
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
        for name in ("overwrite_output_dir", "verify_checkpoint", "trust_checkpoint"):
            if not isinstance(value := getattr(self, name), bool):  # "no" would count as true
                raise ConfigError(f"{name}: got {value!r}, expected true or false.")

    def _check_number(
        self,
        name: str,
        expected: str,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> None:
        """Raise ConfigError if an option isn't a number, or is below `minimum` or above `maximum`.

        Other bounds, such as beta > 0, are checked where the number is used.
        """
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_number = is_number and math.isfinite(value)
        too_small = is_number and minimum is not None and value < minimum
        too_large = is_number and maximum is not None and value > maximum
        if not is_number or too_small or too_large:
            raise ConfigError(f"{name}: got {value!r}, expected a number {expected}.")

    def _check_whole(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (is_whole and value >= minimum):
            raise ConfigError(f"{name}: got {value!r}, expected a whole number >= {minimum}.")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(f"{name}: got {value!r}, expected one of {', '.join(choices)}.")
