"""The sizes of each layer of a transformers model, read from its config.

Layers of one model can differ in size: Gemma 4 has wider heads in the layers without a window, and
other configs hold lists with one size per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpofast.model.parts import CHUNKED_LAYER

# Types of layers: attention in a window, attention to all tokens, and neither attention nor states.
# Layers of other types, such as those of Mamba-1, do work that nothing here counts.
WINDOWED, FULL = "sliding_attention", "full_attention"
WITHOUT = frozenset({"conv", "mlp", "moe"})
# Types of layers with a state, of model types in STATES: a state alone, and a state and attention.
STATE, STATE_AND_ATTENTION = "linear_attention", "hybrid"
# Model types whose layers run several times for a token, attend in a way of their own, or hold all
# experts in one matrix.
OWN_WAYS = frozenset({"dbrx", "diffllama", "hrm_text"})
# What a token does with a state: a delta rule reads it by its key, adds to it, and reads it by its
# query; Mamba-2 adds to it, and reads it.
_DELTA, _MAMBA2 = 3, 2
_GATED_DELTA = (_DELTA, "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
_MAMBA = (_MAMBA2, "mamba_n_heads", "mamba_d_state", "mamba_d_head")
# By model type: the products of a token with each state, and the names of the number of states and
# of their two sizes.
STATES: dict[str, tuple[int, str, str, str]] = {
    "bamba": _MAMBA,
    "falcon_h1": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "kimi_linear": (_DELTA, "linear_num_heads", "linear_head_dim", "linear_head_dim"),
    "mamba2": (_MAMBA2, "num_heads", "state_size", "head_dim"),
    "nemotron_h": (_MAMBA2, "mamba_num_heads", "ssm_state_size", "mamba_head_dim"),
    "olmo_hybrid": _GATED_DELTA,
    "qwen3_5_moe_text": _GATED_DELTA,
    "qwen3_5_text": _GATED_DELTA,
    "qwen3_next": _GATED_DELTA,
    "zamba2": (_MAMBA2, "n_mamba_heads", "mamba_d_state", "mamba_headdim"),
}
# Names of the number of experts that a router chooses from, and of those that it chooses.
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk", "moe_k")


class UnknownSizesError(Exception):
    """The config doesn't say how large a layer is, in a way that is known here."""


@dataclass(frozen=True)
class AttentionSize:
    """The size of one layer's attention.

    Attributes:
        num_heads: query heads.
        key_dim: size of a query head and of a key head.
        value_dim: size of a value head.
        window: most positions that a query sees, its own included; None for no limit.
        chunk: number of positions in a chunk, counted from the beginning of each sequence; a query
            sees its own chunk only. None for no chunks.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    chunk: int | None = None


@dataclass(frozen=True)
class StateSize:
    """The size of one layer's states.

    Attributes:
        num_heads: states, one for each head.
        key_dim, value_dim: the two sizes of a state, which is a matrix.
        products: products of a token with each state: it is read, or something is added to it.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    products: int


def attention_sizes(config: Any) -> list[AttentionSize]:
    """The sizes of all layers that have attention, in their order.

    Args:
        config: a text config of transformers.

    Raises:
        UnknownSizesError: a size is missing, or a layer is of a type that isn't known here.
    """
    return [
        _attention_size(_Layer(config, index), layer_type)
        for index, layer_type in enumerate(_layer_types(config))
        if layer_type != STATE and layer_type not in WITHOUT
    ]


def state_sizes(config: Any) -> list[StateSize]:
    """The sizes of the states of all layers that have some, in their order.

    Args:
        config: a text config of transformers.

    Raises:
        UnknownSizesError: a size is missing, or a layer is of a type that isn't known here.
    """
    found = []
    for index, layer_type in enumerate(_layer_types(config)):
        if layer_type in (STATE, STATE_AND_ATTENTION):
            products, *names = STATES[config.model_type]
            layer = _Layer(config, index)
            num_heads, key_dim, value_dim = (layer.whole(name) for name in names)
            found.append(StateSize(num_heads, key_dim, value_dim, products))
    return found


def _layer_types(config: Any) -> list[str | None]:
    """The type of each layer; None for a config that tells no types.

    Raises:
        UnknownSizesError: a layer is of a type that isn't known here.
    """
    if (model_type := getattr(config, "model_type", None)) in OWN_WAYS:
        raise UnknownSizesError(f"the work of {model_type}'s layers isn't known")
    count = _whole(config, "num_hidden_layers")
    types = getattr(config, "layer_types", None) or [None] * count
    known = {WINDOWED, FULL, CHUNKED_LAYER, None, *WITHOUT}
    if model_type in STATES:
        known |= {STATE, STATE_AND_ATTENTION}
    unknown = sorted(str(each) for each in {*types} - known)
    if unknown or len(types) != count:
        raise UnknownSizesError(f"layers of type {', '.join(unknown)} aren't known")
    return list(types)


def num_experts(config: Any) -> int:
    """Experts that a router of the model chooses from.

    Raises:
        UnknownSizesError: the config has none of the known names for it.
    """
    return _first_whole(config, NUM_EXPERTS)


def experts_per_token(config: Any) -> int:
    """Experts that a router of the model chooses for a token.

    Raises:
        UnknownSizesError: the config has none of the known names for it, or its routers can choose
            experts that do nothing, so that the number differs from token to token.
    """
    if getattr(config, "zero_expert_num", 0):
        raise UnknownSizesError("some experts do nothing")
    return _first_whole(config, PER_TOKEN)


class _Layer:
    """One layer's view of a config: lists with a size per layer become that layer's size."""

    def __init__(self, config: Any, index: int) -> None:
        # transformers' own views of layers, for models whose layers differ. The config itself
        # raises where a size that differs is read from it.
        is_uneven = getattr(config, "is_heterogeneous", False)
        self._config = config.per_layer_config[index] if is_uneven else config
        self._index, self._count = index, config.num_hidden_layers

    def get(self, name: str) -> Any:
        """The layer's value of a field; None if the config hasn't got the field."""
        value = getattr(self._config, name, None)
        if isinstance(value, (list, tuple)) and len(value) == self._count:
            return value[self._index]
        return value

    def whole(self, *names: str) -> int:
        """The layer's value of the first of these fields that the config has."""
        value = next((found for name in names if (found := self.get(name)) is not None), None)
        if not isinstance(value, int):
            raise UnknownSizesError(f"{' or '.join(names)} of a layer is {value!r}")
        return value


def _attention_size(layer: _Layer, layer_type: str | None) -> AttentionSize:
    names = ("num_attention_heads_per_layer", "num_attention_heads", "num_query_heads")
    num_heads = layer.whole(*names)
    window = None if layer_type == FULL else layer.get("sliding_window")
    chunk = layer.get("attention_chunk_size") if layer_type == CHUNKED_LAYER else None
    if layer.get("kv_lora_rank") is not None:  # latent attention: part of a head has positions
        key_dim = layer.whole("qk_nope_head_dim") + layer.whole("qk_rope_head_dim")
    elif layer_type == FULL and layer.get("global_head_dim") is not None:  # older Gemma 4 configs
        key_dim = layer.whole("global_head_dim")
    elif layer.get("head_dim") is not None:
        key_dim = layer.whole("head_dim")
    else:
        key_dim = layer.whole("hidden_size") // num_heads
    value_dim = key_dim if layer.get("v_head_dim") is None else layer.whole("v_head_dim")
    return AttentionSize(num_heads, key_dim, value_dim, window, chunk)


def _whole(config: Any, name: str) -> int:
    return _first_whole(config, (name,))


def _first_whole(config: Any, names: tuple[str, ...]) -> int:
    values = (getattr(config, name, None) for name in names)
    value = next((value for value in values if value is not None), None)
    if not isinstance(value, int) or not value:
        raise UnknownSizesError(f"{' or '.join(names)} is {value!r}")
    return value
