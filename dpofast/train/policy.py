"""Prepares the policy for training: loads it, wraps it in an adapter, sets dropout to 0.

The folders of a run are checked before anything is loaded.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from torch import nn

from dpofast.errors import ConfigError, ModelError, one_line
from dpofast.model.dropout import disable_dropout
from dpofast.model.head import head_forwards
from dpofast.model.load import load_policy, load_tokenizer, was_loaded_here
from dpofast.model.parts import causal_lm, is_peft_model
from dpofast.model.quantised import check_trainable, keep_differentiable
from dpofast.model.unreached import freeze_unreached
from dpofast.model.vocabulary import vocabulary_of
from dpofast.options.checkpointing import chooses_layers
from dpofast.options.config import DPOConfig
from dpofast.options.output_dir import make_output_dir, refuse_inputs_folder
from dpofast.options.quantisation import OPTION, quantisation_options
from dpofast.train.checks.nodes import check_shared_folders
from dpofast.zero.batch import refuse_missing_launcher

logger = logging.getLogger(__name__)


def with_quantisation(config: DPOConfig, quantization_config: Any, model: Any) -> DPOConfig:
    """Adds the trainer's argument `quantization_config` to the options of loading a model.

    Args:
        config: options of the run.
        quantization_config: a BitsAndBytesConfig or a mapping of its arguments; None for none.
        model: the policy as it was given.

    Returns:
        The options; a copy if something was added, as other runs may have the given ones.

    Raises:
        ConfigError: the model is loaded already, or the option is given twice, or can't be used.
    """
    if quantization_config is None:
        return config
    if not isinstance(model, str):
        raise ConfigError(
            f"{OPTION}: the model is loaded already, and a model is quantised when it is loaded: "
            f"pass its name, or load it with from_pretrained(..., {OPTION}=...) and leave the "
            "argument out."
        )
    own = config.model_init_kwargs or {}
    assert isinstance(own, dict)
    options = quantisation_options(quantization_config)
    if own.get(OPTION) not in (None, options):
        raise ConfigError(f"{OPTION}: model_init_kwargs has another one; give it in one place.")
    config = copy.copy(config)
    config.model_init_kwargs = {**own, OPTION: options}
    return config


def resolve_model(model: Any, config: DPOConfig, tokenizer: Any) -> tuple[nn.Module, Any]:
    """The model and its tokenizer; those that are given by name are loaded.

    Args:
        model: causal LM or PeftModel, or the folder or hub name of a causal LM.
        config: options of the run.
        tokenizer: tokenizer; None for the one that is stored with the model.

    Returns:
        The model, and the tokenizer with a token for padding.

    Raises:
        ConfigError: DeepSpeed is wanted but no launcher has started this process, or pad_token
            isn't in the vocabulary.
        ModelError: the model or its tokenizer can't be loaded.
    """
    refuse_missing_launcher(config)  # before loading, which can take minutes
    options = config.loading_options()
    if tokenizer is None:
        name = model_name(model)
        if not name:
            raise ModelError("processing_class is missing, and the model doesn't know its name.")
        tokenizer = load_tokenizer(name, options["trust_remote_code"], options.get("revision"))
    if config.pad_token is not None:
        if config.pad_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"pad_token: {config.pad_token!r} is not in the tokenizer's vocabulary; name a "
                "token that is, or leave it out."
            )
        tokenizer.pad_token = config.pad_token
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if isinstance(model, str):
        model = load_policy(model, **options)
    elif config.model_init_kwargs and not was_loaded_here(causal_lm(model)):
        logger.info("model_init_kwargs are ignored, as the model is loaded already.")
    return model, tokenizer


def check_folders(model: Any, ref_model: Any, config: DPOConfig, trains: bool) -> None:
    """Makes the folder that a training run writes to, and checks the folders that its nodes share.

    Args:
        model: the policy as it was given.
        ref_model: the reference as it was given; None if it is the policy before step 1.
        config: options of the run.
        trains: whether there is a dataset to train on.

    Raises:
        ConfigError: output_dir has something that the run reads, or can't be written; or nodes
            don't share a folder that they must.
    """
    if trains:
        refuse_inputs_folder(config.output_dir, _input_folders(model, ref_model, config))
        if config.should_save:
            make_output_dir(config.output_dir)
    check_shared_folders(config, trains)


def _input_folders(model: Any, ref_model: Any, config: DPOConfig) -> dict[str, str | Path | None]:
    """What a run reads, in words, and its folder or hub name; None if it has none."""
    return {
        "the model": model_name(model),
        "ref_model": None if ref_model is None else model_name(ref_model),
        "reference_store": config.reference_folder(),
    }


def pad_token_id(tokenizer: Any, *models: Any) -> int:
    """The id that fills padded rows: that of the pad token, else of the EOS token, else 0.

    Nothing is scored or attended to there, so any id does that has a row in every embedding.

    Args:
        tokenizer: tokenizer of the policy.
        models: models that run the rows; None entries are ignored.
    """
    sizes = [vocabulary_of(model).size for model in models if model is not None]
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    known = (token for token in ids if token is not None and all(token < size for size in sizes))
    return next(known, 0)


def resolve_ref_model(ref_model: Any, model: Any, config: DPOConfig) -> Any:
    """The reference model, loaded if it is given by name.

    Args:
        ref_model: model, folder or hub name; None if the reference is the policy before step 1.
        model: the policy as it was given.
        config: options of the run.

    Returns:
        The model, or None if the reference is the policy before step 1.

    Raises:
        ConfigError: the reference is the same object as the policy, so training would change it.
        ModelError: the reference can't be loaded.
    """
    own = config.ref_model_init_kwargs
    if isinstance(ref_model, str):
        if ref_model == model and own is None:
            return None
        return load_policy(ref_model, **config.ref_loading_options())
    is_loaded_here = ref_model is not None and was_loaded_here(causal_lm(ref_model))
    if own is not None and not is_loaded_here:
        logger.info("ref_model_init_kwargs are ignored, as no ref_model is given by name.")
    if ref_model is None:
        return None
    if ref_model is model:
        raise ConfigError("ref_model is the model itself; leave it out, or pass a copy.")
    return ref_model


def model_name(model: Any) -> str:
    """The folder or hub name of a model; empty if the model doesn't know it.

    Raises:
        ConfigError: the argument is neither a name nor a model.
    """
    if isinstance(model, str):
        return model
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ConfigError(
            f"model: got a {type(model).__name__}, expected a causal LM or the name of one."
        )
    return str(getattr(model.config, "_name_or_path", ""))


def prepare_policy(model: Any, config: DPOConfig, peft_config: Any) -> nn.Module:
    """Adds a fresh adapter if one is configured, freezes what text doesn't reach, checks the head.

    It also sets dropout to 0 if asked.

    Args:
        model: causal LM or PeftModel.
        config: options of the run.
        peft_config: the adapter's config; None for no fresh adapter.

    Raises:
        ConfigError: peft isn't installed, or this kind of adapter isn't supported; or checkpointing
            is wanted and the model's class has none.
        ModelError: nothing would be trained, or the model or its head can't be trained exactly.
    """
    keep_differentiable(model)
    lm = causal_lm(model)
    has_checkpointing = getattr(lm, "supports_gradient_checkpointing", True)
    if config.gradient_checkpointing and not chooses_layers(config) and not has_checkpointing:
        raise ConfigError(
            f"gradient_checkpointing: {type(lm).__name__} doesn't support it; set it to false."
        )
    if peft_config is not None:
        model = _with_adapter(model, peft_config)
    plugin = config.deepspeed_plugin
    check_trainable(model, None if plugin is None else plugin.zero_stage)
    if is_peft_model(model):
        if any(getattr(c, "is_prompt_learning", False) for c in model.peft_config.values()):
            raise ConfigError(
                "peft_config: prompt and prefix tuning aren't supported; use LoRA or another "
                "adapter that changes layers."
            )
        # The embedding below an adapter is frozen. Reentrant checkpointing of a layer whose input
        # needs no gradient would give none to the adapter inside.
        if config.gradient_checkpointing:
            model.enable_input_require_grads()
    freeze_unreached(model)  # raises if the body can't be called apart from the head
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            "No parameter of the model requires a gradient, so nothing would be trained: load an "
            "adapter with PeftModel.from_pretrained(..., is_trainable=True), or set requires_grad."
        )
    if config.disable_dropout:
        disable_dropout(model)
    head_forwards(causal_lm(model).get_output_embeddings())  # raises here, not in the first step
    for name in config.loss_type:
        if config.label_smoothing and name in ("sigmoid", "sigmoid_norm"):
            logger.warning(
                "label_smoothing=%g with the %s loss is conservative DPO (TRL ignores it there).",
                config.label_smoothing,
                name,
            )
    return model


def _with_adapter(model: Any, peft_config: Any) -> Any:
    """The model inside a fresh adapter."""
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("peft_config needs peft: pip install 'dpofast[peft]'.") from error
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config: got a {type(peft_config).__name__}, expected a peft.PeftConfig, such "
            "as peft.LoraConfig."
        )
    if is_peft_model(model):
        raise ConfigError(
            "peft_config: the model has an adapter already; leave peft_config out (use_peft on the "
            "command line and in YAML) to train that one further, or merge it first with "
            "merge_and_unload()."
        )
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    try:
        adapted = get_peft_model(model, peft_config)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        hint = ""
        if "target_modules" in str(error) and not getattr(peft_config, "target_modules", None):
            hint = "; set lora_target_modules on the command line or in YAML, such as all-linear"
        raise ConfigError(
            f"peft_config: peft can't make this adapter: {one_line(error)}{hint}"
        ) from error
    # With the config as peft has it now: older names of weights have become newer ones.
    for config in adapted.peft_config.values():
        _warn_of_unmatched(config, type(model).__name__, modules, parameters)
    return adapted


def _warn_of_unmatched(
    peft_config: Any, model_class: str, modules: list[str], parameters: list[str]
) -> None:
    """Logs names in an adapter's config that no module or parameter has.

    peft says nothing as long as one of the names is right. That is no error here, because a list
    may serve several models.
    """
    kinds = {"target_modules": modules, "modules_to_save": modules, "target_parameters": parameters}
    for field, known in kinds.items():
        names = getattr(peft_config, field, None)
        for wanted in [] if names is None or isinstance(names, str) else sorted(names):
            if not any(f".{name}".endswith(f".{wanted}") for name in known):
                logger.warning(
                    "peft_config: nothing in %s is called %r, which %s (lora_%s on the command "
                    "line and in YAML) names; correct it if it should be trained.",
                    *(model_class, wanted, field, field),
                )
