"""Methods of TRL's and transformers' trainers that would be ignored if a subclass overrode them.

Every method that a script may override is either called, with what docs/extending.md says, or is in
the table of this file with the place to go instead.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig
from dpofast.options.trl_fields import RULES, Refused
from dpofast.train.hooks.settings import Setting
from dpofast_kernels import PreferenceLoss

PAGE = "see docs/extending.md"
_LOSS = (
    "give a loss of your own as loss_fn and what you log as metrics_fn, or override compute_loss "
    f"to add terms to the loss ({PAGE})"
)
_ROWS = (
    "give rows in a form that docs/data.md describes; already tokenised ones have the columns "
    "prompt_ids, chosen_ids and rejected_ids"
)
_BATCH = f"a batch holds packed rows; override compute_loss or training_step ({PAGE})"
_REFERENCE = (
    "pass ref_model, or give the log-probs as columns ref_chosen_logps and ref_rejected_logps"
)
_COLUMNS = (
    "columns are never removed by their names, and a batch holds only tokens and reference "
    f"log-probs ({PAGE})"
)
_LOADER = "override get_train_dataloader, get_eval_dataloader or get_test_dataloader"
_METRICS = f"give what you log as metrics_fn ({PAGE})"
_COLLATOR = "leave it out; batches are laid out by the trainer"
_SEARCH = "hyperparameter_search isn't supported; run dpofast once per setting"

# Methods and attributes that are never called or read, and the place to go.
IGNORED_HOOKS: dict[str, str] = {
    # transformers' Trainer
    "_get_train_sampler": "set train_sampling_strategy: sequential, and bring the rows into order",
    "_get_eval_sampler": "leave it out; every held-out pair counts once, in any order",
    "_get_dataloader": _LOADER,
    "_set_signature_columns_if_needed": _COLUMNS,
    "_remove_unused_columns": _COLUMNS,
    "_get_collator_with_removed_columns": _COLUMNS,
    "_get_num_items_in_batch": (
        "the loss is the mean over the pairs of the optimizer step; weight pairs by loss_fn, or "
        f"override compute_loss ({PAGE})"
    ),
    "_prepare_input": _BATCH,
    "_prepare_inputs": _BATCH,
    "_prepare_context_parallel_inputs": _BATCH,
    "autocast_smart_context_manager": "override compute_loss_context_manager",
    "loss_is_scaled_for_ga": (
        "leave it out; compute_loss returns the mean over a micro-batch's pairs, and each "
        "micro-batch counts by its share of the step's pairs"
    ),
    "prediction_loop": "override evaluation_loop",
    "call_model_init": "pass the model",
    "_hp_search_setup": _SEARCH,
    "_report_to_hp_search": _SEARCH,
    "_tune_save_checkpoint": _SEARCH,
    # TRL's DPOTrainer, from 0.9 to 1.16
    "_compute_loss": _LOSS,
    "_compute_loss_liger": _LOSS,
    "dpo_loss": _LOSS,
    "get_batch_loss": _LOSS,
    "get_batch_loss_metrics": _LOSS,
    "get_batch_metrics": _LOSS,
    "concatenated_forward": _LOSS,
    "concatenated_inputs": _LOSS,
    "get_batch_logps": _LOSS,
    "_get_batch_logps": _LOSS,
    "store_metrics": _METRICS,
    "_prepare_dataset": _ROWS,
    "tokenize_row": _ROWS,
    "process_row": _ROWS,
    "build_tokenized_answer": _ROWS,
    "_tokenize": _ROWS,
    "_truncate_inputs": f"{_ROWS}; max_length and truncation_mode say how they are cut",
    "null_ref_context": _REFERENCE,
    "compute_reference_log_probs": _REFERENCE,
    "compute_ref_log_probs": _REFERENCE,
    "_precompute_ref_logps": _REFERENCE,
    "_prepare_deepspeed": _REFERENCE,
    "_prepare_peft_model": "give the model with its adapter, or a peft_config",
    "_prepare_gradient_checkpointing": "set gradient_checkpointing and its kwargs",
    "generate_from_model_and_ref": "generate in a callback, or override evaluation_loop",
    "get_sample": "generate in a callback, or override evaluation_loop",
}
# Attributes that transformers' Trainer reads and this one doesn't: assigned later, they would be
# ignored. They are None otherwise.
IGNORED_ATTRIBUTES = {
    "compute_loss_func": _LOSS,
    "preprocess_logits_for_metrics": "no logits exist; compute_metrics gets log-probs and rewards",
    "model_init": "pass the model",
}
# The trainer has attributes of these names, which hide a method of a subclass.
HIDDEN_METHODS = {
    "compute_metrics": f"pass the function to DPOTrainer as its argument compute_metrics ({PAGE})",
    "pair_loss": f"pass the function to DPOTrainer as its argument loss_fn ({PAGE})",
    "data_collator": _COLLATOR,
}
# Attributes by which TRL's trainers choose their loss and its reference; options are called alike.
TRL_ATTRIBUTES = (
    *("rpo_alpha", "reference_free", "sync_ref_model"),
    *("model_adapter_name", "ref_adapter_name"),
)
# What overrides written for TRL read from its trainer.
_MISSING = {"_metrics": _METRICS, "_stored_metrics": _METRICS}
_OURS = ("dpofast.", "transformers.", "torch.")


class MissingHookError(ConfigError, AttributeError):
    """A call of a method that TRL's trainer has and this one hasn't; says where to go."""


def override_of(trainer: Any, name: str) -> str | None:
    """Where a method of a trainer is overridden, for messages; None if it is the library's own.

    Args:
        trainer: a transformers Trainer.
        name: name of a method; the trainer need not have it.
    """
    if name in vars(trainer):
        return f"{type(trainer).__qualname__}.{name}, assigned to the trainer"
    return _override_in_class(type(trainer), name)


def _override_in_class(trainer_class: type, name: str) -> str | None:
    for kind in trainer_class.__mro__:
        if name in vars(kind):
            given = vars(kind)[name]
            # A script may also have replaced the method on a class of ours.
            is_ours = kind.__module__.startswith(_OURS) and _module(given).startswith(_OURS)
            return None if is_ours else f"{kind.__qualname__}.{name}"
    return None


def _module(value: Any) -> str:
    """The module that a function was written in; functools.wraps doesn't change it."""
    function = getattr(value, "fget", None) or getattr(value, "__func__", value)
    function = getattr(function, "func", function)  # of a partial one
    if not callable(function):
        return _OURS[0]
    written = getattr(function, "__globals__", {}).get("__name__")
    return written or getattr(function, "__module__", None) or ""


def check_overrides(trainer: Any) -> None:
    """Raise at the first override or assignment that would be ignored.

    Raises:
        ConfigError: it names the class, the method and the place to go.
    """
    for name, remedy in IGNORED_HOOKS.items():
        if (where := override_of(trainer, name)) is not None:
            raise ConfigError(f"{where}: DPOTrainer never calls or reads it: {remedy}.")
    for name, remedy in HIDDEN_METHODS.items():
        if (where := _override_in_class(type(trainer), name)) is not None:
            raise ConfigError(f"{where}: DPOTrainer never calls or reads it: {remedy}.")
    for name, remedy in IGNORED_ATTRIBUTES.items():
        if getattr(trainer, name, None) is not None:
            raise ConfigError(f"DPOTrainer: {name} isn't supported: {remedy}.")
    collator = vars(trainer).get("data_collator")
    if collator is not None and not _module(collator).startswith(_OURS):
        raise ConfigError(f"DPOTrainer: data_collator isn't supported: {_COLLATOR}.")
    loss = vars(trainer).get("pair_loss")
    if loss is not None and not isinstance(loss, PreferenceLoss):
        raise ConfigError(
            f"DPOTrainer.pair_loss: got a {type(loss).__name__}, expected what make_loss, "
            "make_mixture, make_coupled_loss or make_custom_loss of dpofast_kernels returns."
        )
    reference = vars(trainer).get("reference")
    if loss and reference and loss.is_reference_free != reference.is_none:
        raise ConfigError(
            "DPOTrainer.pair_loss: only one of this loss and that of the options has a reference; "
            "choose it by loss_type instead."
        )
    _check_settings(trainer)
    _check_samples_hook(trainer)


def _check_settings(trainer: Any) -> None:
    """Look for attributes that would choose a setting in TRL's trainer, and nothing in this one."""
    for kind in type(trainer).__mro__:
        for name, setting in vars(kind).items():
            if not isinstance(setting, Setting):
                continue
            if (where := _override_in_class(type(trainer), name)) is not None:
                raise ConfigError(f"{where}: it would change nothing: {setting.remedy}.")
    for name in TRL_ATTRIBUTES:
        rule = RULES[name]
        value = getattr(trainer, name, None)
        if value not in (None, getattr(DPOConfig, name), *rule.neutral):
            assert isinstance(rule, Refused)
            raise ConfigError(f"DPOTrainer.{name}: {value!r} isn't supported: {rule.remedy}.")


def _check_samples_hook(trainer: Any) -> None:
    """TRL 0.9 had a method of this name that generates; transformers now calls it for batches."""
    where = override_of(trainer, "get_batch_samples")
    if where is None:
        return
    try:
        inspect.signature(trainer.get_batch_samples).bind(None, 1, None)
    except TypeError as error:
        raise ConfigError(
            f"{where}: transformers calls it with (epoch_iterator, num_batches, device) to take "
            "batches from the loader. To generate samples, use a callback, or another name."
        ) from error


class NamesHooks:
    """Gives methods and attributes that only TRL's trainer has an error that says where to go."""

    if not TYPE_CHECKING:  # a type checker would take every attribute for one that exists

        def __getattr__(self, name: str) -> Any:
            remedy = IGNORED_HOOKS.get(name) or _MISSING.get(name)
            if remedy is not None:
                raise MissingHookError(
                    f"{type(self).__qualname__}.{name}: DPOTrainer has nothing of this name: "
                    f"{remedy}."
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
