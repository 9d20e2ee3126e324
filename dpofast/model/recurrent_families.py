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
            must call each of them.
        whole: names of functions that run all of that in one kernel. In packed rows they return
            None, as they do where there is no such kernel, and the mixer calls the others.
    """

    mixer: str
    layer_types: frozenset[str]
    functions: Mapping[str, MakeShared]
    whole: frozenset[str] = frozenset()


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


def _state_space(own: Callable[..., Any], parts: RowParts) -> Callable[..., Tensor]:
    """For Mamba-2's scan of inputs [1, T, ...]; states are [1, H, D, N]."""

    def state_space(
        hidden_states: Tensor,
        dt: Tensor,
        decay: Tensor,
        to_state: Tensor,
        from_state: Tensor,
        *,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        _check_without_cache(initial_states, return_final_states)

        def scan(
            inputs: Sequence[Tensor], state: Tensor | None, keeps_state: bool
        ) -> tuple[Tensor, Tensor | None]:
            hidden_states, dt, to_state, from_state = inputs
            more = {"initial_states": state, "return_final_states": keeps_state, **kwargs}
            found = own(hidden_states, dt, decay, to_state, from_state, **more)
            return found if keeps_state else (found, None)

        return shared_scan(scan, (hidden_states, dt, to_state, from_state), parts)

    return state_space


def _check_without_cache(initial_state: Tensor | None, keeps_state: bool) -> None:
    if initial_state is not None or keeps_state:
        raise ModelError(
            "A layer runs a packed row with a cache of earlier tokens, but the row's sequences "
            "continue none; set layout: padded."
        )


_CONVOLUTION: dict[str, MakeShared] = {"causal_conv1d_fn": _convolution}
_GATED_DELTA: dict[str, MakeShared] = {**_CONVOLUTION, "torch_chunk_gated_delta_rule": _delta_rule}
_KIMI_DELTA: dict[str, MakeShared] = {**_CONVOLUTION, "chunk_kimi_delta_attention": _delta_rule}
_STATE_SPACE: dict[str, MakeShared] = {**_CONVOLUTION, "mamba2_chunk_scan": _state_space}
_LINEAR = frozenset({"linear_attention"})
_CONV = frozenset({"conv"})
_HYBRID = frozenset({"linear_attention", "hybrid"})


def _mamba2(mixer: str, layer_types: frozenset[str] = _LINEAR) -> RecurrentFamily:
    whole = frozenset({"mamba2_split_conv1d_scan_combined"})
    return RecurrentFamily(mixer, layer_types, _STATE_SPACE, whole)


# By model type. The names are those of transformers 5.17 to 5.23. Where a version has others, the
# model runs padded.
RECURRENT_FAMILIES = {
    "bamba": _mamba2("BambaMixer"),
    "falcon_h1": _mamba2("FalconH1Mixer", _HYBRID),
    "granitemoehybrid": _mamba2("GraniteMoeHybridMambaLayer"),
    "kimi_linear": RecurrentFamily("KimiLinearDeltaAttention", _LINEAR, _KIMI_DELTA),
    "lfm2": RecurrentFamily("Lfm2ShortConv", _CONV, _CONVOLUTION),
    "lfm2_moe": RecurrentFamily("Lfm2MoeShortConv", _CONV, _CONVOLUTION),
    "lfm3": RecurrentFamily("Lfm3ShortConv", _CONV, _CONVOLUTION),
    "mamba2": _mamba2("Mamba2Mixer"),
    "nemotron_h": _mamba2("NemotronHMamba2Mixer"),
    "olmo_hybrid": RecurrentFamily("OlmoHybridGatedDeltaNet", _LINEAR, _GATED_DELTA),
    "qwen3_5_moe_text": RecurrentFamily("Qwen3_5MoeGatedDeltaNet", _LINEAR, _GATED_DELTA),
    "qwen3_5_text": RecurrentFamily("Qwen3_5GatedDeltaNet", _LINEAR, _GATED_DELTA),
    "qwen3_next": RecurrentFamily("Qwen3NextGatedDeltaNet", _LINEAR, _GATED_DELTA),
    "zamba2": _mamba2("Zamba2MambaMixer", _HYBRID),
}
