"""Tiny models with RoPE of type dynamic or longrope, and stock forwards that remember nothing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dpofast.model.parts import body_of, causal_lm
from tests.families import tiny_model

KINDS = ("dynamic", "longrope")
ORIGINAL_LENGTH = 10


def ropes_of(model: Any) -> list[nn.Module]:
    """The RoPE modules of a model, those with buffers of frequencies."""
    return [
        module
        for module in body_of(causal_lm(model)).modules()
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]


def rope_parameters(kind: str, frequencies: int, length: int = ORIGINAL_LENGTH) -> dict[str, Any]:
    """Parameters of a RoPE whose frequencies change beyond `length` tokens."""
    shared = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "dynamic":
        return shared
    return {
        **shared,
        "short_factor": [1.0] * frequencies,
        "long_factor": [3.0 + index for index in range(frequencies)],
        "original_max_position_embeddings": length,
    }


def stretched(family: str, kind: str) -> Any:
    """A tiny model of a family, whose RoPE changes beyond ORIGINAL_LENGTH tokens."""
    model = tiny_model(family)
    config = copy.deepcopy(model.config)
    frequencies = {
        name.removesuffix("inv_freq").strip("_"): len(buffer)
        for rope in ropes_of(model)
        for name, buffer in rope.named_buffers(recurse=False)
    }
    old = config.rope_parameters
    config.max_position_embeddings = ORIGINAL_LENGTH
    if all(isinstance(value, dict) for value in old.values()):  # one for each type of layer
        config.rope_parameters = {
            # In Gemma 4, transformers can compute one type only for layers with larger heads.
            name: {**value, **rope_parameters(kind, frequencies[name])}
            if value["rope_type"] == "default"
            else value
            for name, value in old.items()
        }
    else:
        scales = {"short_mscale": 1.0, "long_mscale": 1.2} if family == "phimoe" else {}
        # Beam has one set of parameters for all types of layers, whose heads are of one size.
        count = max(frequencies.values())
        config.rope_parameters = {**old, **rope_parameters(kind, count), **scales}
    torch.manual_seed(0)
    changed = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    changed.load_state_dict(model.state_dict())
    return changed


@contextlib.contextmanager
def forgetful(model: Any) -> Iterator[None]:
    """Inside the `with` block, each stock forward finds the RoPE modules as they are now.

    transformers' dynamic RoPE remembers the longest sequence. Here, sequences that run one at a
    time don't influence each other.
    """
    begin = [(module, copy.deepcopy(module.__dict__)) for module in ropes_of(model)]

    def reset(*_: Any) -> None:
        for module, state in begin:
            module.__dict__.clear()
            module.__dict__.update(copy.deepcopy(state))

    handle = body_of(causal_lm(model)).register_forward_pre_hook(reset)
    try:
        yield
    finally:
        reset()
        handle.remove()
