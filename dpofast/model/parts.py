"""The parts of a transformers causal LM: what is inside an adapter, body, layers, parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpofast.errors import ModelError


def causal_lm(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def is_peft_model(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def body_of(model: Any) -> nn.Module:
    """What makes the hidden states that the head gets.

    Raises:
        ModelError: an encoder-decoder, or no body apart from the head.
    """
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models are supported."
        )
    body = model.get_decoder()
    if body is None or body is model:
        body = model.base_model
    if body is model:
        body = getattr(model, "model", model)  # Llama4 names another attribute than it has
    if body is model or model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} has no body and head to be called apart.")
    return body


def num_layers(model: Any) -> int:
    """Decoder layers; each calls attention once at least, where it has any."""
    return int(model.config.get_text_config().num_hidden_layers)


def numel(parameter: Tensor) -> int:
    """Elements of a parameter, also of one that ZeRO-3 has spread over the ranks."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shape(parameter: Tensor) -> torch.Size:
    """Of a parameter, also of one that ZeRO-3 has spread over the ranks."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
