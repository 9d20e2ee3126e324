"""Options of other tools and versions: harmless ones are accepted, others refused with a remedy."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from dpofast.errors import ConfigError

# Options that TRL or transformers has or had. Each has the values that change nothing, which are
# therefore accepted, and a remedy for all other values.
FOREIGN_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_prompt_length": ((None,), "set max_length, which counts prompt + answer"),
    "max_completion_length": ((None,), "set max_length, which counts prompt + answer"),
    "max_target_length": ((None,), "set max_length, which counts prompt + answer"),
    "loss_weights": ((None, [1.0], (1.0,)), "train with one loss_type"),
    "ld_alpha": ((None, 1.0), "leave it out; length desensitisation isn't supported"),
    "f_divergence_type": (("reverse_kl",), "leave it out; only reverse_kl is supported"),
    "f_alpha_divergence_coef": ((0.5, 1.0), "leave it out; only reverse_kl is supported"),
    "use_weighting": ((False,), "leave it out; WPO weights aren't supported"),
    "discopop_tau": ((0.05,), "leave it out; discopop isn't supported"),
    "rpo_alpha": ((None,), "leave it out; the extra likelihood term isn't supported"),
    "sync_ref_model": ((False,), "leave it out; the reference stays fixed during a run"),
    "ref_model_mixup_alpha": ((0.6,), "leave it out; the reference stays fixed during a run"),
    "ref_model_sync_steps": ((512,), "leave it out; the reference stays fixed during a run"),
    "reference_free": ((False,), "leave it out; a reference is always used"),
    "force_use_ref_model": ((False, True), "leave it out"),
    "padding_free": ((False,), "leave it out; no batch has to be padding-free"),
    "pad_to_multiple_of": ((None, "auto"), "leave it out; rows are as long as they need to be"),
    "use_logits_to_keep": ((False, True), "leave it out; only answers ever reach the head"),
    "activation_offloading": ((False,), "use gradient_checkpointing"),
    "is_encoder_decoder": ((None, False), "use a decoder-only model"),
    "generate_during_eval": ((False,), "generate in a callback, or after training"),
    "label_pad_token_id": ((-100,), "leave it out; labels aren't padded"),
    "padding_value": ((None,), "set the tokenizer's pad_token"),
    "model_adapter_name": ((None,), "leave it out; the active adapter is trained"),
    "ref_adapter_name": ((None,), "leave it out; the reference is the model before step 1"),
    "ref_model_init_kwargs": ((None,), "load the reference yourself and pass it as ref_model"),
    "base_model_attribute_name": (("model",), "leave it out"),
    "model_init": ((None,), "pass the model"),
    "compute_loss_func": ((None,), "give a loss of your own as loss_fn (docs/extending.md)"),
    "optimizer_cls_and_kwargs": ((None,), "pass optimizers, or override create_optimizer"),
    "preprocess_logits_for_metrics": (
        (None,),
        "no logits exist; compute_metrics gets log-probs and rewards (docs/extending.md)",
    ),
    "overwrite_output_dir": ((False,), "name another output_dir, or resume_from_checkpoint"),
    "save_safetensors": ((True,), "leave it out; checkpoints are always safetensors"),
    "logging_dir": ((None,), "set TENSORBOARD_LOGGING_DIR in the environment"),
    "no_cuda": ((False,), "set use_cpu"),
    "group_by_length": ((False,), "leave it out; steps see the pairs in the shuffled order"),
    "evaluation_strategy": ((), "transformers calls it eval_strategy now"),
    "dataset_streaming": ((False,), "leave it out; the pairs are read into memory"),
    "streaming": ((False,), "leave it out; the pairs are read into memory"),
    "test_split_size": ((None,), "set eval_split, which holds out whole prompts"),
    "datasets": (
        (None, []),
        "list the paths in dataset_name and the fractions in dataset_shares; dataset_config, "
        "dataset_train_split and dataset_columns are the same for all datasets",
    ),
    "tools": ((None,), "put the tools into a column `tools` of the dataset"),
}


def refuse_unknown_options(
    options: dict[str, Any], known: Collection[str], where: str = "DPOConfig"
) -> dict[str, Any]:
    """Drops foreign options whose value changes nothing, and refuses all other unknown ones.

    Args:
        options: names and values as the user gave them.
        known: names of the options that exist.
        where: file or class that the options come from, used in messages.

    Returns:
        The known options.

    Raises:
        ConfigError: a foreign option has a value that isn't supported, or an option doesn't exist.
    """
    kept = {}
    for name, value in options.items():
        if name in known:
            kept[name] = value
        elif name in FOREIGN_OPTIONS:
            neutral, remedy = FOREIGN_OPTIONS[name]
            if value not in neutral:
                raise ConfigError(f"{where}: {name}={value!r} isn't supported: {remedy}.")
        else:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "; see docs/configuration.md."
            raise ConfigError(f"{where}: there is no option {name!r}{hint}")
    return kept
