"""The option allow_changed: which facts of a run may differ when it resumes."""

from __future__ import annotations

from collections.abc import Collection

from dpofast.errors import ConfigError

_STATES = "the saved states of the optimizer belong to it"
_REFERENCE = "the reference log-probs were computed in it"
_MODEL = "the saved weights belong to it"

# Facts that the user may change by allow_changed. The trainer applies each of them.
SCHEDULED = frozenset(
    {
        "learning_rate",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "max_steps",
        "num_train_epochs",
        "warmup_ratio",
        "warmup_steps",
    }
)
LIMITS = frozenset({"max_completion_length", "max_length", "max_prompt_length", "truncation_mode"})
ALLOWABLE = (
    SCHEDULED
    | LIMITS
    | {
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "alpha",
        "beta",
        "cpo_alpha",
        "beta_end",
        "beta_max",
        "beta_min",
        "beta_schedule",
        "data",
        "data_seed",
        "dataloader_drop_last",
        "desirable_weight",
        "disable_dropout",
        "discopop_tau",
        "dpop_lambda",
        "f_alpha_divergence_coef",
        "f_divergence_type",
        "group_by_prompt",
        "label_smoothing",
        "ld_alpha",
        "loss_fn",
        "loss_type",
        "loss_weights",
        "max_grad_norm",
        "optim_args",
        "router_aux_loss_coef",
        "seed",
        "simpo_gamma",
        "target_kl",
        "target_kl_gain",
        "train_sampling_strategy",
        "undesirable_weight",
        "use_weighting",
        "weight_decay",
        "weighting_clamp",
    }
)
# Facts that can't change, and why. A name that ends with a point is a group of facts.
FIXED = {
    "adapter.": _STATES,
    "base_model": "the adapter was trained on it",
    "bf16": _REFERENCE,
    "config.": _MODEL,
    "deepspeed": _STATES,
    "deepspeed_optimizer": _STATES,
    "deepspeed_scheduler": "DeepSpeed makes the schedule, and restores it",
    "dtype": _STATES,
    "fp16": _REFERENCE,
    "lr_scheduler": "its saved state belongs to it",
    "model": _MODEL,
    "optim": _STATES,
    "optim_target_modules": _STATES,
    "optimizer": _STATES,
    "pairs_per_step": "the place in the data is counted in steps",
    "trained_weights": _STATES,
}
# Facts that change only the rounding of sums and the draws of dropout.
ROUNDING = frozenset(
    {
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "attention",
        "ddp_bucket_cap_mb",
        "ddp_static_graph",
        "device",
        "full_determinism",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "head_backend",
        "layout",
        "liger_kernel_config",
        "max_tokens_per_microbatch",
        "per_device_train_batch_size",
        "ranks",
        "tf32",
        "use_cpu",
        "use_liger_kernel",
        "versions",
    }
)


def read_allowed(option: Collection[str] | str | None) -> frozenset[str]:
    """The names in the option allow_changed.

    Args:
        option: a list of names, or names in a string with commas between them.

    Raises:
        ConfigError: there is no such fact, or it can't change.
    """
    if not isinstance(option, str | Collection | None):
        raise ConfigError(f"allow_changed: got {option!r}, expected a list of names.")
    given = option.replace(",", " ").split() if isinstance(option, str) else option or ()
    names = frozenset(str(name) for name in given)
    for name in sorted(names - ALLOWABLE):
        reason = why_fixed(name)
        if reason is not None:
            raise ConfigError(f"allow_changed: {name} can't change in a resumed run, as {reason}.")
        if name in ROUNDING:
            raise ConfigError(
                f"allow_changed: {name} needs no permission, as it changes only how sums are "
                "rounded; leave it out."
            )
        raise ConfigError(
            f"allow_changed: {name!r} is unknown; choose among {', '.join(sorted(ALLOWABLE))}."
        )
    return names


def why_fixed(name: str) -> str | None:
    """Why a fact can't change; None if it can, or if there is no such fact."""
    group = name.partition(".")[0] + "."
    return FIXED.get(name, FIXED.get(group))
