"""Says early what kind of model can't be trained: anything but a causal LM with a head."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from dpofast.errors import ModelError
from dpofast.model.model_types import why_refused
from dpofast.model.parts import causal_lm

_NEEDED = "DPO trains causal language models (a class such as LlamaForCausalLM); name one."
# What the end of a class's name says about its head.
_OTHER_HEADS = {
    "For(Sequence|Token)Classification|Reward(Model)?": "a classifier, such as a reward model",
    "ForQuestionAnswering|ForMultipleChoice": "a model with another head",
    "ForMaskedLM|ForPreTraining": "a masked language model, which isn't causal",
}


def refuse_stored_kind(name_or_path: str, **options: Any) -> None:
    """Reads a model's config, without its weights, and refuses kinds that can't be trained.

    Args:
        name_or_path: folder or hub name.
        options: arguments of `AutoConfig.from_pretrained`, such as `revision`. Without
            trust_remote_code, a config that comes with code isn't read; transformers would ask on
            the terminal, and wait for an answer.

    Raises:
        ModelError: the config is that of another kind of model. A config that can't be read is no
            error here: loading the model says more about it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name_or_path, **{"trust_remote_code": False, **options})
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):
        return
    architectures = getattr(config, "architectures", None) or [""]
    kind = _kind(config, str(architectures[0])) or _body_only(config, str(architectures[0]))
    if kind is not None:
        raise ModelError(f"The model {name_or_path!r} is {kind}. {_NEEDED}")


def refuse_kinds(*models: Any) -> None:
    """Refuses models that can't be trained, whatever the options are.

    Args:
        models: transformers models, PeftModels, or folders. Anything else is ignored: what a hub
            name means depends on the options, and is checked when the model is loaded.

    Raises:
        ModelError: says what kind of model it is, and what is needed.
    """
    for model in models:
        if isinstance(model, str) and Path(model).is_dir():
            refuse_stored_kind(model, local_files_only=True)
        elif isinstance(model, nn.Module) and hasattr(model, "config"):
            check_kind(model)


def refuse_other_type(name_or_path: str, error: Exception) -> None:
    """Says in one sentence that transformers has no causal LM of a model's type.

    Args:
        name_or_path: folder or hub name, used in the message.
        error: what transformers raised; its message lists the hundreds of types that it knows.

    Raises:
        ModelError: this is the error's reason.
    """
    found = re.search(r"Unrecognized configuration class <class '(?:.*\.)?(\w+)'>", str(error))
    if found:
        raise ModelError(
            f"The model {name_or_path!r} can't be loaded, as transformers has no causal language "
            f"model with a {found.group(1)}. {_NEEDED}"
        ) from error


def check_kind(model: Any) -> None:
    """Refuses a model that was given as an object and isn't a causal LM.

    Args:
        model: transformers model or PeftModel.

    Raises:
        ModelError: says what kind of model it is, and what is needed.
    """
    lm = causal_lm(model)
    name = type(lm).__name__
    kind = _kind(lm.config, name)
    head = getattr(lm, "get_output_embeddings", lambda: None)()
    if kind is None and head is None:
        kind = "a model without a language modelling head"
    if kind is not None:
        raise ModelError(f"{name} is {kind}. {_NEEDED}")


def refuse_random_head(model: Any, missing: Iterable[str], name_or_path: str) -> None:
    """Refuses a loaded model whose head wasn't in its files.

    Args:
        model: transformers model, as it was loaded.
        missing: names of the weights that the files don't have, which are random therefore.
        name_or_path: folder or hub name, used in the message.

    Raises:
        ModelError: names the weights.
    """
    random = sorted(name for name in missing if not name.startswith(f"{model.base_model_prefix}."))
    if random:
        raise ModelError(
            f"The model {name_or_path!r} has no language modelling head: {', '.join(random)} would "
            f"be random. {_NEEDED}"
        )


def _kind(config: Any, class_name: str) -> str | None:
    """The kind of a model in words; None if it may be a causal LM."""
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    heads = (kind for end, kind in _OTHER_HEADS.items() if re.search(f"({end})$", class_name))
    return next(heads, None) or why_refused(config)


def _body_only(config: Any, class_name: str) -> str | None:
    """The kind of a stored model whose head would get random weights; None if it has a head."""
    if config.get_text_config().tie_word_embeddings or getattr(config, "auto_map", None):
        return None  # the head is the embedding; or the class is the repository's own
    if re.search(r"(?<!LMHead)(?<!DoubleHeads)Model$", class_name):
        return "a model without a language modelling head, such as an embedding model"
    return None
