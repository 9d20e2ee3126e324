"""Families of models with layers that pass something on from token to token.

Such a layer, a mixer, calls functions of its module for what goes from token to token: a causal
convolution, and a recurrence. In packed rows only these functions are replaced. What else a mixer
does, it does for each token by itself, in transformers' own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpofast.errors import ModelError
from dpofast_kernels.recurrent import RowParts, shared_convolution, shared_scan

# Makes the function for a packed row from a family's own function and the parts of the row.
MakeShared = Callable[[Callable[..., Any], RowParts], Callable[..., Any]]


@dataclass(frozen=True)
class RecurrentFamily:
    """What is replaced in the mixers of a model type.

    Attributes:
        mixer: name of the mixers' class.
        layer_types: types of the layers that have a mixer, as in the config's `layer_types`.
        functions: what takes the place of functions of the mixers' module, by their names. A mixer
            calls each of them once.
    """

    mixer: str
    layer_types: frozenset[str]
    functions: Mapping[str, MakeShared]


def _convolution(own: Callable[..., Tensor], parts: RowParts) -> Callable[..., Tensor]:
    """For a depthwise convolution of inputs [1, C, T] with a weight [C, K]."""

    def convolution(inputs: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def convolve(row: Tensor) -> Tensor:
            return own(row, weight, *args, **kwargs)

        return shared_convolution(convolve, inputs, weight.shape[-1], parts)

    return convolution


def _delta_rule(
    own: Callable[..., tuple[Tensor, Tensor | None]], parts: RowParts
) -> Callable[..., tuple[Tensor, None]]:
    """For a gated delta rule of inputs [1, T, ...]; states are [1, H, D, Dv]."""

    def delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        _check_without_cache(initial_state, output_final_state)

        def scan(
            inputs: Sequence[Tensor], state: Tensor | None, keeps_state: bool
        ) -> tuple[Tensor, Tensor | None]:
            query, key, value, g, beta = inputs
            more = {"initial_state": state, "output_final_state": keeps_state, **kwargs}
            return own(query, key, value, g=g, beta=beta, **more)

        return shared_scan(scan, (query, key, value, g, beta), parts), None

    return delta_rule


def _check_without_cache(initial_state: Tensor | None, keeps_state: bool) -> None:
    if initial_state is not None or keeps_state:
        raise ModelError(
            "A layer runs a packed row with a cache of earlier tokens, which no sequence in the row "
            "continues; set layout: padded."
        )


_CONVOLUTION = {"causal_conv1d_fn": _convolution}
_GATED_DELTA = {**_CONVOLUTION, "torch_chunk_gated_delta_rule": _delta_rule}
_KIMI_DELTA = {**_CONVOLUTION, "chunk_kimi_delta_attention": _delta_rule}
_LINEAR = frozenset({"linear_attention"})

# By model type. The names are those of transformers 5.23. Where a version has others, the model
# runs padded.
RECURRENT_FAMILIES = {
    "kimi_linear": RecurrentFamily("KimiLinearDeltaAttention", _LINEAR, _KIMI_DELTA),
    "olmo_hybrid": RecurrentFamily("OlmoHybridGatedDeltaNet", _LINEAR, _GATED_DELTA),
    "qwen3_5_moe_text": RecurrentFamily("Qwen3_5MoeGatedDeltaNet", _LINEAR, _GATED_DELTA),
    "qwen3_5_text": RecurrentFamily("Qwen3_5GatedDeltaNet", _LINEAR, _GATED_DELTA),
    "qwen3_next": RecurrentFamily("Qwen3NextGatedDeltaNet", _LINEAR, _GATED_DELTA),
}
