"""Loads a causal LM, its skeleton without weights, or its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from safetensors import SafetensorError
from torch import nn

from dpofast.errors import ConfigError, ModelError, one_line
from dpofast.model.kind import refuse_other_type, refuse_random_head, refuse_stored_kind
from dpofast.model.pickled_weights import refuse_pickled_on_hub, refuse_pickled_weights
from dpofast.options.quantisation import OPTION, bitsandbytes_config, quantisation_options
from dpofast.progress import bars_as_lines

# Options for loading weights, which a skeleton doesn't have.
_WEIGHT_OPTIONS = {
    *("dtype", "use_safetensors", "device_map", "low_cpu_mem_usage", "variant"),
    OPTION,
}

_loaded: WeakSet[nn.Module] = WeakSet()  # models that load_policy has returned


def load_policy(name_or_path: str, **options: Any) -> Any:
    """Loads a causal LM from a folder or the hub, in float32 unless `dtype` is given.

    Args:
        name_or_path: folder or hub name.
        options: arguments of `from_pretrained`. `dtype` may be a name such as "bfloat16".
            use_safetensors is True by default, as other formats can hold pickles. A
            `quantization_config` can be a BitsAndBytesConfig or a mapping of its arguments.

    Raises:
        ConfigError: the `quantization_config` can't be used, or the weights are stored in a number
            of bits other than it asks for.
        ModelError: there is no such model, or no causal LM can be loaded from it.
    """
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "use_safetensors": True, **options}
    if isinstance(options["dtype"], str) and options["dtype"] != "auto":
        options["dtype"] = _dtype_named(options["dtype"])
    if options.get(OPTION) is not None:
        options[OPTION] = bitsandbytes_config(quantisation_options(options[OPTION]))
    _refuse_missing_folder(name_or_path)
    refuse_stored_kind(name_or_path, **_config_options(options))
    refuse_pickled_weights(name_or_path, options)
    try:
        with bars_as_lines():
            model, report = AutoModelForCausalLM.from_pretrained(
                name_or_path, output_loading_info=True, **options
            )
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        refuse_pickled_on_hub(name_or_path, options, error)
        refuse_other_type(name_or_path, error)
        hint = ""
        if isinstance(error, TypeError) and "unexpected keyword" in str(error):
            hint = "; mend this name in model_init_kwargs or ref_model_init_kwargs."
        raise ModelError(f"The model {name_or_path!r} can't be loaded: {error}{hint}") from error
    refuse_random_head(model, report["missing_keys"], name_or_path)
    _refuse_other_bits(model, options.get(OPTION), name_or_path)
    _loaded.add(model)
    return model


def was_loaded_here(model: nn.Module) -> bool:
    """Whether `load_policy` has loaded a model: then it was loaded with the options of its run."""
    return model in _loaded


def load_skeleton(name_or_path: str, **options: Any) -> Any:
    """Builds a causal LM from its config only, on the device "meta": it has no weights.

    A skeleton is enough to choose a layout, and costs neither memory nor a download.

    Args:
        name_or_path: folder or hub name.
        options: options that `load_policy` takes.

    Raises:
        ModelError: there is no config, or no causal LM can be built from it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _refuse_missing_folder(name_or_path)
    trusted = bool(options.get("trust_remote_code"))
    own = _config_options(options)
    refuse_stored_kind(name_or_path, **own)
    try:
        config = AutoConfig.from_pretrained(name_or_path, **own)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, KeyError) as error:
        refuse_other_type(name_or_path, error)
        raise ModelError(
            f"The model {name_or_path!r} can't be built from its config: {error}"
        ) from error


def load_tokenizer(
    name_or_path: str, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """Loads the tokenizer that is stored with a model.

    Args:
        name_or_path: the model's folder or hub name.
        trust_remote_code: run the tokenizer's own code, if it has any.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: there is no tokenizer, or it can't be loaded.
    """
    from transformers import AutoTokenizer

    _refuse_missing_folder(name_or_path)
    remedy = (
        "save one there with tokenizer.save_pretrained, or name one (tokenizer_name_or_path on the "
        "command line, processing_class in Python)"
    )
    folder = Path(name_or_path)
    # The error of transformers for such a folder doesn't say that the tokenizer is missing.
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        raise ModelError(f"The model folder {name_or_path!r} has no tokenizer: {remedy}.")
    try:
        return AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, revision=revision or "main"
        )
    except (OSError, ValueError, KeyError) as error:
        reason = one_line(error)
        if "tokenizer" not in reason.lower():
            # Such as a name that isn't on the hub, or a config that is damaged.
            remedy = "mend this, or name another model"
        raise ModelError(
            f"No tokenizer can be loaded from {name_or_path!r} ({reason}): {remedy}."
        ) from error


def _config_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that decide what the model's config is."""
    return {name: value for name, value in options.items() if name not in _WEIGHT_OPTIONS}


def _refuse_other_bits(model: Any, wanted: Any, name_or_path: str) -> None:
    """Refuse a model that was stored quantised otherwise: transformers takes it as it is."""
    quantizer = getattr(model, "hf_quantizer", None)
    if wanted is None or quantizer is None or not quantizer.pre_quantized:
        return
    stored = getattr(quantizer.quantization_config, "load_in_4bit", None)
    if stored is not None and stored != wanted.load_in_4bit:
        raise ConfigError(
            f"{OPTION}: the weights in {name_or_path!r} are stored in {4 if stored else 8} bits, "
            "and can't be quantised otherwise; leave the option out, or name the model that they "
            "were made from."
        )


def _dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"dtype: got {name!r}, expected auto, bfloat16, float16 or float32.")
    return dtype


def _refuse_missing_folder(name_or_path: str) -> None:
    if not name_or_path:
        raise ModelError("The model's name is empty; name its folder or its hub name.")
    if Path(name_or_path).is_file():
        raise ModelError(f"{name_or_path!r} is a file; name the model's folder or its hub name.")
    # transformers takes a folder that doesn't exist for a hub name, and complains about the name.
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not Path(name_or_path).expanduser().is_dir():
        raise ModelError(f"The model folder {name_or_path!r} does not exist.")
