"""The parts of a transformers causal LM: the model inside an adapter, its body, its sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dpofast.errors import ModelError

# Types of layers: those that look at other tokens only through attention, those that look at none,
# and those that have attention beside something else that passes on from token to token.
CHUNKED_LAYER = "chunked_attention"
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", CHUNKED_LAYER})
TOKENWISE_LAYERS = frozenset({"mlp", "moe"})
HYBRID_LAYERS = frozenset({"hybrid"})


def causal_lm(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def is_peft_model(model: nn.Module) -> bool:
    """Whether this is a PeftModel. Its attributes tell, as peft may not be installed."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def is_placed(model: nn.Module) -> bool:
    """Whether from_pretrained has spread the model over devices, where it must stay."""
    return hasattr(causal_lm(model), "hf_device_map")


def body_of(model: Any) -> nn.Module:
    """The part of a causal LM that computes the hidden states for the head.

    Raises:
        ModelError: the model is an encoder-decoder, or its body can't be called without the head.
    """
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models are supported."
        )
    body = model.get_decoder()
    if body is None or body is model:
        body = model.base_model
    if body is model:
        # Llama4's base_model_prefix names an attribute that it doesn't have.
        body = getattr(model, "model", model)
    if body is model or model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} has no body and head to be called apart.")
    return body


def num_layers(model: Any) -> int:
    """Number of decoder layers of a causal LM or PeftModel.

    Where the config has no such number, as BLT's, it is that of the layers that transformers can
    checkpoint, and 1 if there are none.
    """
    lm = causal_lm(model)
    count = getattr(lm.config.get_text_config(), "num_hidden_layers", None)
    return int(count) if count is not None else len(checkpointable_layers(lm)) or 1


def checkpointable_layers(model: Any) -> list[Any]:
    """The layers that transformers can checkpoint one by one, in their order."""
    body = body_of(causal_lm(model))  # without the layers of a tower for pictures
    return [each for each in body.modules() if isinstance(each, GradientCheckpointingLayer)]


def num_attention_layers(model: Any) -> int:
    """Number of decoder layers that have attention; each calls it at least once."""
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return int(config.num_hidden_layers)
    return sum(each in ATTENTION_LAYERS | HYBRID_LAYERS for each in layer_types)


def numel(parameter: Tensor) -> int:
    """Number of elements in the whole parameter, even if ZeRO-3 has spread it over the ranks.

    A 4-bit weight has the elements that it had before it was quantised.
    """
    if (size := _size_before_packing(parameter)) is not None:
        return size.numel()
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shape(parameter: Tensor) -> torch.Size:
    """The whole shape of a parameter, even if ZeRO-3 has spread it over the ranks.

    A 4-bit weight has the shape that it had before it was quantised.
    """
    if (size := _size_before_packing(parameter)) is not None:
        return size
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def num_bytes(parameter: Tensor) -> int:
    """Bytes of the whole parameter, even if ZeRO-3 has spread it over the ranks.

    The scales of quantised weights are left out: they are a hundredth of the model, or less.
    """
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


def _size_before_packing(parameter: Any) -> torch.Size | None:
    """The shape that a 4-bit weight had before two of its elements were put into each byte."""
    size = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return None if size is None else torch.Size(size)
