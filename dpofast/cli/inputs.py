"""Loads the tokenizer, data and models that the options name.

The tokenizer and the data come first, so that their errors show before a model is loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpofast.cli.run_data import NO_HELD_OUT_PAIRS, load_run_data
from dpofast.cli.run_options import RunOptions
from dpofast.errors import ConfigError, ModelError
from dpofast.model.pickled_weights import refuse_pickled_weights

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Inputs:
    """The models, tokenizer and datasets that a DPOTrainer takes."""

    model: Any
    ref_model: Any
    tokenizer: Any
    train_dataset: Any
    eval_dataset: Any


def load_tokenizer_for(options: RunOptions) -> Any:
    """Load the tokenizer, and give it the chat template and pad token of the options.

    Raises:
        ModelError: there is no tokenizer of this name.
        ConfigError: the chat template's file can't be read.
    """
    from dpofast.model.load import load_tokenizer

    script = options.script
    # A revision names a commit of the policy's repository, so it is meaningless in any other.
    revision = script.model_revision if script.tokenizer_name_or_path is None else None
    tokenizer = load_tokenizer(script.tokenizer, options.config.trust_remote_code, revision)
    template = options.script.chat_template
    if template is not None:
        tokenizer.chat_template = _template_text(template)
    if options.config.pad_token is not None:
        tokenizer.pad_token = options.config.pad_token
    return tokenizer


def load_inputs(options: RunOptions) -> Inputs:
    """Load everything that training or scoring needs, the models last.

    Raises:
        ConfigError: evaluation is asked for, but there are no held-out pairs.
        DataError: the data can't be used; names the file and row.
        ModelError: a model or the tokenizer can't be loaded.
    """
    from dpofast.model.kind import refuse_stored_kind

    _refuse_training_quantised(options)
    tokenizer = load_tokenizer_for(options)
    loading = options.config.loading_options()
    for name in filter(None, (options.script.model, options.script.ref_model_name_or_path)):
        refuse_missing_model(name, loading)
        revision = loading.get("revision") if name == options.script.model else None
        trusted = options.config.trust_remote_code
        refuse_stored_kind(name, trust_remote_code=trusted, revision=revision or "main")
    train_dataset, eval_dataset = load_run_data(options)
    evaluates = str(options.config.eval_strategy.value) != "no"
    if eval_dataset is None and evaluates:
        raise ConfigError(f"{options.source}: eval_strategy is set, but {NO_HELD_OUT_PAIRS}")
    if options.script.eval_split is not None and not evaluates:
        logger.info(
            "Training doesn't measure on the held-out pairs unless eval_strategy is set; "
            "`dpofast eval` with the same options does."
        )
    return Inputs(
        model=load_policy_model(options),
        ref_model=load_reference_model(options),
        tokenizer=tokenizer,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )


def trainer_class(options: RunOptions) -> Any:
    """The trainer of the loss that the options name."""
    from dpofast.options.named_loss import is_unpaired
    from dpofast.train.kto import KTOTrainer
    from dpofast.train.trainer import DPOTrainer

    return KTOTrainer if is_unpaired(options.config) else DPOTrainer


def load_policy_model(options: RunOptions) -> Any:
    """Load the policy: a causal LM, or a PeftModel whose adapter is trained further."""
    from dpofast.model.load import load_policy

    return _load_model(options, options.script.model, load_policy)


def load_reference_model(options: RunOptions) -> Any:
    """Load the reference model; None if the reference is the policy before training."""
    from dpofast.model.load import load_policy

    name = options.script.ref_model_name_or_path
    own = options.config.ref_model_init_kwargs
    kwargs = None if own is None else options.config.ref_loading_options()
    return None if name is None else _load_model(options, name, load_policy, kwargs)


def load_policy_skeleton(options: RunOptions) -> Any:
    """Build the policy as training would, with its adapter and dropouts, but without weights.

    Raises:
        ModelError: the model's config can't be used.
        ConfigError: an option doesn't suit the model.
    """
    from dpofast.model.load import load_skeleton
    from dpofast.train.policy import prepare_policy

    refuse_missing_model(options.script.model)
    model = _load_model(options, options.script.model, load_skeleton)
    return prepare_policy(model, options.config, adapter_options(options))


def adapter_base(name_or_path: str) -> str | None:
    """The name of the model below an adapter; None if the folder holds no adapter.

    Raises:
        ModelError: the adapter's config can't be read, or names no model.
    """
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
    """Make a peft.LoraConfig from the lora_ options; None if no adapter is asked for.

    Raises:
        ConfigError: peft isn't installed, or an option is out of range.
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
    modules = script.lora_target_modules
    if isinstance(modules, str) and modules != "all-linear" and modules.isidentifier():
        modules = [modules]  # peft takes a text for a regular expression of whole paths
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=modules,
        target_parameters=script.lora_target_parameters,
        modules_to_save=script.lora_modules_to_save,
        use_rslora=script.use_rslora,
        use_dora=script.use_dora,
        task_type=script.lora_task_type,
    )


def refuse_missing_model(name_or_path: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise ModelError if a local folder holds no model, which is cheap to find out early.

    Args:
        name_or_path: folder or hub name.
        options: arguments of `from_pretrained`.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return  # a name on the hub; a wrong path was refused when the tokenizer was loaded
    if not (folder / "config.json").is_file() and not (folder / ADAPTER_FILE).is_file():
        raise ModelError(
            f"The model folder {name_or_path!r} has neither config.json nor {ADAPTER_FILE}: name "
            "a folder that save_pretrained has written."
        )
    if not (folder / ADAPTER_FILE).is_file():  # peft loads an adapter's pickle, and runs no code
        refuse_pickled_weights(name_or_path, options)


def _refuse_training_quantised(options: RunOptions) -> None:
    script = options.script
    is_quantised = script.load_in_4bit or script.load_in_8bit
    if is_quantised and not script.use_peft and adapter_base(script.model) is None:
        name = "load_in_4bit" if script.load_in_4bit else "load_in_8bit"
        raise ConfigError(
            f"{options.source}: {name} needs use_peft: true, as an optimizer can't update "
            "quantised weights; add that, or name the folder of an adapter."
        )


def _load_model(
    options: RunOptions,
    name_or_path: str,
    load: Callable[..., Any],
    own: dict[str, Any] | None = None,
) -> Any:
    """Load a model with `load`; for an adapter, load its base model and put the adapter on top.

    Args:
        options: options of the run.
        name_or_path: folder or hub name of a model or an adapter.
        load: function of `dpofast.model.load`.
        own: the model's own arguments of `from_pretrained`; by default the policy's.
    """
    from dpofast.zero.batch import refuse_missing_launcher

    # Checked before loading, because ZeRO-3 needs the process group to load each rank's part.
    refuse_missing_launcher(options.config)
    kwargs = options.config.loading_options() if own is None else dict(own)
    base = adapter_base(name_or_path)
    if own is None and (name_or_path != options.script.model or base is not None):
        kwargs.pop("revision", None)  # it names a commit of the policy's repository only
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
        # Without is_trainable, peft would freeze the adapter.
        return PeftModel.from_pretrained(model, name_or_path, is_trainable=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"The adapter in {name_or_path!r} can't be loaded: {error}") from error


def _template_text(template: str) -> str:
    if "{" in template:  # every Jinja template has a brace, and hardly any path does
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"chat_template: got {template!r}, which is neither a Jinja template nor a file that "
            f"can be read: {error.strerror}."
        ) from error
