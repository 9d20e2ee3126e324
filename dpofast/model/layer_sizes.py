"""The sizes of each layer of a transformers model, read from its config.

Layers of one model can differ in size: Gemma 4 has wider heads in the layers without a window, and
other configs hold lists with one size per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Types of layers: attention in a window, attention to all tokens, and no attention. Layers of other
# types, such as state-space layers, do work that nothing here counts.
WINDOWED, FULL, WITHOUT = "sliding_attention", "full_attention", "conv"
# Model types whose layers run several times for a token, attend in a way of their own, or hold all
# experts in one matrix.
OWN_WAYS = frozenset({"dbrx", "diffllama", "hrm_text"})
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
    """

    num_heads: int
    key_dim: int
    value_dim: int
    window: int | None


def attention_sizes(config: Any) -> list[AttentionSize]:
    """The sizes of all layers that have attention, in their order.

    Args:
        config: a text config of transformers.

    Raises:
        UnknownSizesError: a size is missing, or a layer is of a type that isn't known here.
    """
    if (model_type := getattr(config, "model_type", None)) in OWN_WAYS:
        raise UnknownSizesError(f"the work of {model_type}'s layers isn't known")
    count = _whole(config, "num_hidden_layers")
    types = getattr(config, "layer_types", None) or [None] * count
    unknown = sorted({str(each) for each in types} - {WINDOWED, FULL, WITHOUT, "None"})
    if unknown or len(types) != count:
        raise UnknownSizesError(f"layers of type {', '.join(unknown)} aren't known")
    return [
        _attention_size(_Layer(config, index), layer_type)
        for index, layer_type in enumerate(types)
        if layer_type != WITHOUT
    ]


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
    if layer.get("kv_lora_rank") is not None:  # latent attention: part of a head has positions
        key_dim = layer.whole("qk_nope_head_dim") + layer.whole("qk_rope_head_dim")
    elif layer_type == FULL and layer.get("global_head_dim") is not None:  # older Gemma 4 configs
        key_dim = layer.whole("global_head_dim")
    elif layer.get("head_dim") is not None:
        key_dim = layer.whole("head_dim")
    else:
        key_dim = layer.whole("hidden_size") // num_heads
    value_dim = key_dim if layer.get("v_head_dim") is None else layer.whole("v_head_dim")
    return AttentionSize(num_heads, key_dim, value_dim, window)


def _whole(config: Any, name: str) -> int:
    return _first_whole(config, (name,))


def _first_whole(config: Any, names: tuple[str, ...]) -> int:
    values = (getattr(config, name, None) for name in names)
    value = next((value for value in values if value is not None), None)
    if not isinstance(value, int) or not value:
        raise UnknownSizesError(f"{' or '.join(names)} is {value!r}")
    return value
