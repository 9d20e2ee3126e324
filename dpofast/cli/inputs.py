"""Loads what the options name: the tokenizer and the data first, since they are cheap to check."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpofast.cli.options import RunOptions
from dpofast.errors import ConfigError, ModelError

ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Inputs:
    """All that a trainer is made of."""

    model: Any
    ref_model: Any
    tokenizer: Any
    train_dataset: Any
    eval_dataset: Any


def load_tokenizer_for(options: RunOptions) -> Any:
    """The tokenizer that the options name, with their chat template and pad token.

    Raises:
        ModelError: there is none.
        ConfigError: the chat template's file can't be read.
    """
    from dpofast.model.load import load_tokenizer

    script = options.script
    revision = script.model_revision if script.tokenizer_name_or_path is None else None
    tokenizer = load_tokenizer(script.tokenizer, options.config.trust_remote_code, revision)
    template = options.script.chat_template
    if template is not None:
        tokenizer.chat_template = _template_text(template)
    if options.config.pad_token is not None:
        tokenizer.pad_token = options.config.pad_token
    return tokenizer


def load_training_data(options: RunOptions) -> Any:
    """The training pairs in the normal form.

    Raises:
        DataError: with the file and row.
    """
    return _load(options, options.script.dataset_name, options.script.dataset_train_split)


def load_held_out_data(options: RunOptions) -> Any:
    """The held-out pairs in the normal form; None where no option names any.

    Raises:
        DataError: with the file and row.
    """
    script = options.script
    if script.eval_dataset_name is not None:
        split = script.dataset_test_split or "train"
        return _load(options, script.eval_dataset_name, split)
    if script.dataset_test_split is not None:
        return _load(options, script.dataset_name, script.dataset_test_split)
    return None


def load_inputs(options: RunOptions) -> Inputs:
    """Everything that training or scoring takes, the models last."""
    tokenizer = load_tokenizer_for(options)
    refuse_missing_model(options.script.model)
    if options.script.ref_model_name_or_path is not None:
        refuse_missing_model(options.script.ref_model_name_or_path)
    train_dataset = load_training_data(options)
    eval_dataset = load_held_out_data(options)
    if eval_dataset is None and str(options.config.eval_strategy.value) != "no":
        raise ConfigError(
            f"{options.source}: eval_strategy is set, but there are no held-out pairs; set "
            "eval_dataset_name or dataset_test_split."
        )
    return Inputs(
        model=load_policy_model(options),
        ref_model=load_reference_model(options),
        tokenizer=tokenizer,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )


def load_policy_model(options: RunOptions) -> Any:
    """The policy: a causal LM, or a PeftModel whose adapter is trained further."""
    from dpofast.model.load import load_policy

    return _load_model(options, options.script.model, load_policy)


def load_reference_model(options: RunOptions) -> Any:
    """The reference model; None where the policy's start is the reference."""
    from dpofast.model.load import load_policy

    name = options.script.ref_model_name_or_path
    return None if name is None else _load_model(options, name, load_policy)


def load_policy_skeleton(options: RunOptions) -> Any:
    """The policy as it would train, adapter and dropout included, but without its weights.

    Raises:
        ModelError, ConfigError: as where it is loaded for training.
    """
    from dpofast.model.load import load_skeleton
    from dpofast.train.policy import prepare_policy

    refuse_missing_model(options.script.model)
    model = _load_model(options, options.script.model, load_skeleton)
    return prepare_policy(model, options.config, adapter_options(options))


def adapter_base(name_or_path: str) -> str | None:
    """The model below an adapter's folder; None where the folder holds no adapter."""
    path = Path(name_or_path).expanduser() / ADAPTER_FILE
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} can't be read: {error!r}; save the adapter again.") from error
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{path} names no model below the adapter: write it to base_model_name_or_path."
        )
    return base


def adapter_options(options: RunOptions) -> Any:
    """A peft.LoraConfig of the lora_ options; None where no adapter was asked for.

    Raises:
        ConfigError: peft isn't installed.
    """
    script = options.script
    if not script.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            f"{options.source}: use_peft needs peft: pip install 'dpofast[peft]'."
        ) from error
    if script.lora_r < 1 or not 0.0 <= script.lora_dropout < 1.0:
        raise ConfigError(
            f"{options.source}: got lora_r {script.lora_r} and lora_dropout {script.lora_dropout}, "
            "expected a rank of at least 1 and a dropout from 0 to below 1."
        )
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=script.lora_target_modules,
        modules_to_save=script.lora_modules_to_save,
        task_type="CAUSAL_LM",
    )


def make_output_dir(options: RunOptions) -> None:
    """Make the output folder before anything is loaded.

    Raises:
        ConfigError: it can't be made.
    """
    folder = Path(options.config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{options.source}: output_dir: {str(folder)!r} can't be made: {error.strerror}."
        ) from error


def refuse_missing_model(name_or_path: str) -> None:
    """Raise ModelError where a local model folder holds no model, before data is loaded."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return  # a name on the hub, or a path that loading the tokenizer has refused
    if not (folder / "config.json").is_file() and not (folder / ADAPTER_FILE).is_file():
        raise ModelError(
            f"The model folder {name_or_path!r} has neither config.json nor {ADAPTER_FILE}: name "
            "a folder that save_pretrained has written."
        )


def _load_model(options: RunOptions, name_or_path: str, load: Callable[..., Any]) -> Any:
    from dpofast.zero.batch import refuse_missing_launcher

    refuse_missing_launcher(options.config)  # ZeRO-3 loads a model in parts
    kwargs = options.config.loading_options()
    base = adapter_base(name_or_path)
    if name_or_path != options.script.model or base is not None:
        kwargs.pop("revision", None)  # the policy's, of no other model
    if base is None:
        return load(name_or_path, **kwargs)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(
            f"{name_or_path!r} holds an adapter, which needs peft: pip install 'dpofast[peft]'."
        ) from error
    model = load(base, **kwargs)
    try:
        return PeftModel.from_pretrained(model, name_or_path, is_trainable=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"The adapter in {name_or_path!r} can't be loaded: {error}") from error


def _load(options: RunOptions, source: str | None, split: str) -> Any:
    from dpofast.data import load_preferences

    return load_preferences(
        source,
        columns=options.script.dataset_columns,
        roles=options.script.dataset_roles,
        split=split,
        strict=options.config.strict,
        config_name=options.script.dataset_config,
    )


def _template_text(template: str) -> str:
    if "{" in template:
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"chat_template: got {template!r}, which is neither a Jinja template nor a file that "
            f"can be read: {error.strerror}."
        ) from error
