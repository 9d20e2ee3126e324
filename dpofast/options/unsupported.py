"""Options of transformers and of accelerate's launcher that are refused, or have no effect."""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from dpofast.errors import ConfigError
from dpofast.options.optimizers import check_optimizer

_COMPILING = "leave it out; rows differ in every step, and would compile each time"
_REMEDIES = {
    "label_smoothing_factor": "set label_smoothing",
    "neftune_noise_alpha": "leave it out; the policy would differ from its reference",
    "parallelism_config": "leave it out; ranks share a step's pairs, not a sequence",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILING),
    "fsdp": "set deepspeed to zero2 or zero3, which spread gradients and weights likewise",
}

_COLUMNS = "the trainer chooses the columns itself"
_NO_LOGITS = "evaluations keep no logits"
# Options that Trainer's own methods read where DPOTrainer has others.
UNUSED = {
    "remove_unused_columns": _COLUMNS,
    "label_names": _COLUMNS,
    "length_column_name": _COLUMNS,
    "use_cache": "training needs no cache of keys and values",
    "torch_empty_cache_steps": "PyTorch keeps the memory that it has",
    "average_tokens_across_devices": "a step's loss is the mean over its pairs on all ranks",
    "dataloader_multiprocessing_context": "the data loader takes Python's default",
    "dataloader_in_order": "steps run in the order of their plan",
    **dict.fromkeys(("eval_accumulation_steps", "eval_use_gather_object"), _NO_LOGITS),
}


def unused_options(config: Any) -> list[str]:
    """Looks for options that are given, but that nothing here reads.

    Args:
        config: a DPOConfig, before transformers reads it.

    Returns:
        One remark for each option.
    """
    remarks = []
    usual = {item.name: item for item in fields(TrainingArguments)}
    for name, reason in UNUSED.items():
        item, value = usual[name], getattr(config, name)
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if value != default:
            remarks.append(f"{name}={value!r} ({reason})")
    if config.warmup_ratio and config.warmup_steps:
        remarks.append(f"warmup_ratio={config.warmup_ratio!r} (warmup_steps is set)")
    return remarks


def check_unsupported(config: TrainingArguments) -> None:
    """Looks at the options as they were given, before transformers reads them.

    Raises:
        ConfigError: names the first option that isn't supported, and what to do.
    """
    if config.auto_find_batch_size:
        raise ConfigError(
            "auto_find_batch_size isn't supported, as it would change the pairs of a step; "
            "lower per_device_train_batch_size and raise gradient_accumulation_steps."
        )
    if config.fp16_full_eval or config.bf16_full_eval:
        raise ConfigError(
            "fp16_full_eval and bf16_full_eval aren't supported, as the policy would be "
            "compared with a reference in another precision; use fp16 or bf16."
        )
    for name, remedy in _REMEDIES.items():
        if getattr(config, name, None):
            raise ConfigError(f"{name} isn't supported: {remedy}.")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ConfigError("accelerate launch --use_fsdp isn't supported: use --use_deepspeed.")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ConfigError(
            "accelerate launch --dynamo_backend isn't supported: set it to no; rows differ in "
            "every step, and would compile each time."
        )
    _check_report_to(config.report_to)
    check_optimizer(config.optim, bool(config.use_cpu))
    strategy = config.train_sampling_strategy
    if strategy not in ("random", "sequential"):
        raise ConfigError(
            f"train_sampling_strategy: got {strategy!r}, expected 'random' or 'sequential'."
        )


def _check_report_to(value: Any) -> None:
    names = [value] if isinstance(value, str) else value or []
    usable = {"all", "none", *get_available_reporting_integrations()}
    for name in names:
        if name not in usable:
            raise ConfigError(
                f"report_to: {name!r} is unknown or not installed here; choose among "
                f"{', '.join(sorted(usable))}."
            )
