"""Families of models with layers that pass something on from token to token.

Such a layer, a mixer, calls functions of its module for what goes from token to token: a causal
convolution, and a recurrence. In packed rows only these functions are replaced. What else a mixer
does, it does for each token by itself, in transformers' own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from dpofast.errors import ModelError
from dpofast.model.recurrent_kernels import RecurrentKernel
from dpofast_kernels.recurrent import (
    RowParts,
    shared_convolution,
    shared_scan,
    shared_varlen_scan,
)

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
        kernel: what may run the recurrence on a GPU; None for mixers without a recurrence.
    """

    mixer: str
    layer_types: frozenset[str]
    functions: Mapping[str, MakeShared]
    whole: frozenset[str] = frozenset()
    kernel: RecurrentKernel | None = None


def _convolution(own: Callable[..., Tensor], parts: RowParts) -> Callable[..., Tensor]:
    """For a depthwise convolution of inputs [1, C, T] with a weight [C, K]."""

    def convolution(inputs: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def convolve(row: Tensor) -> Tensor:
            return own(row, weight, *args, **kwargs)

        return shared_convolution(convolve, inputs, weight.shape[-1], parts)

    return convolution


def _delta_rule(
    own: Callable[..., tuple[Tensor, Tensor | None]], parts: RowParts, *, kernel: RecurrentKernel
) -> Callable[..., tuple[Tensor, None]]:
    """For a gated delta rule of inputs [1, T, ...]; states are [1, H, D, Dv].

    Its kernel takes and gives the states of N sequences, [N, H, D, Dv] in fp32.
    """

    def delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        _check_without_cache(initial_state, output_final_state)
        options = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        inputs = (query, key, value, g, beta)
        function = kernel.for_sequences(query.device)
        if function is not None:
            return _in_two_calls(partial(function, **options), inputs, parts, kernel), None

        def scan(
            inputs: Sequence[Tensor], state: Tensor | None, keeps_state: bool
        ) -> tuple[Tensor, Tensor | None]:
            query, key, value, g, beta = inputs
            more = {"initial_state": state, "output_final_state": keeps_state, **options, **kwargs}
            return own(query, key, value, g=g, beta=beta, **more)

        return shared_scan(scan, inputs, parts), None

    return delta_rule


def _in_two_calls(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    inputs: Sequence[Tensor],
    parts: RowParts,
    kernel: RecurrentKernel,
) -> Tensor:
    """A delta rule by a kernel that runs several sequences in one call.

    Raises:
        ModelError: the kernel doesn't keep the sequences apart.
    """

    def scan(
        inputs: Sequence[Tensor], states: Tensor | None, bounds: Tensor, keeps_states: bool
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value, g, beta = inputs
        more = {"initial_state": states, "output_final_state": keeps_states, "cu_seqlens": bounds}
        return function(query, key, value, g=g, beta=beta, **more)

    try:
        return shared_varlen_scan(scan, inputs, parts)
    except ValueError as error:  # ours, or the kernel's own about its inputs
        raise ModelError(
            f"{kernel.name} of {kernel.package} can't run packed rows ({error}); set layout: "
            "padded, or install another version."
        ) from error


def _state_space(own: Callable[..., Any], parts: RowParts) -> Callable[..., Tensor]:
    """For Mamba-2's scan of inputs [1, T, ...]; states are [1, H, D, N].

    Its kernel takes one state for a row and gives no gradients of the states of several
    sequences, so it runs part by part as well.
    """

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


# The kernels that transformers calls in place of its torch functions, where they are installed.
CONVOLUTION_KERNEL = RecurrentKernel("causal-conv1d", "causal_conv1d", "causal_conv1d_fn", False)
_GATED_DELTA_KERNEL = RecurrentKernel(
    "flash-linear-attention", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", True
)
_KIMI_DELTA_KERNEL = RecurrentKernel("flash-linear-attention", "fla.ops.kda", "chunk_kda", True)
_STATE_SPACE_KERNEL = RecurrentKernel(
    "mamba-ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", False
)
KERNELS = (CONVOLUTION_KERNEL, _GATED_DELTA_KERNEL, _KIMI_DELTA_KERNEL, _STATE_SPACE_KERNEL)
# The function that transformers has in the module of every family with such kernels.
CONVOLUTION = "causal_conv1d_fn"
_CONVOLUTION: dict[str, MakeShared] = {CONVOLUTION: _convolution}
_GATED_DELTA: dict[str, MakeShared] = {
    **_CONVOLUTION,
    "torch_chunk_gated_delta_rule": partial(_delta_rule, kernel=_GATED_DELTA_KERNEL),
}
_KIMI_DELTA: dict[str, MakeShared] = {
    **_CONVOLUTION,
    "chunk_kimi_delta_attention": partial(_delta_rule, kernel=_KIMI_DELTA_KERNEL),
}
_STATE_SPACE: dict[str, MakeShared] = {**_CONVOLUTION, "mamba2_chunk_scan": _state_space}
_LINEAR = frozenset({"linear_attention"})
_CONV = frozenset({"conv"})
_HYBRID = frozenset({"linear_attention", "hybrid"})


def _gated_delta(mixer: str) -> RecurrentFamily:
    return RecurrentFamily(mixer, _LINEAR, _GATED_DELTA, kernel=_GATED_DELTA_KERNEL)


def _mamba2(mixer: str, layer_types: frozenset[str] = _LINEAR) -> RecurrentFamily:
    whole = frozenset({"mamba2_split_conv1d_scan_combined"})
    return RecurrentFamily(mixer, layer_types, _STATE_SPACE, whole, _STATE_SPACE_KERNEL)


# By model type. The names are those of transformers 5.17 to 5.23. A run with a version that has
# others is refused, unless it asks for padded rows.
RECURRENT_FAMILIES = {
    "bamba": _mamba2("BambaMixer"),
    "falcon_h1": _mamba2("FalconH1Mixer", _HYBRID),
    "granitemoehybrid": _mamba2("GraniteMoeHybridMambaLayer"),
    "kimi_linear": RecurrentFamily(
        "KimiLinearDeltaAttention", _LINEAR, _KIMI_DELTA, kernel=_KIMI_DELTA_KERNEL
    ),
    "lfm2": RecurrentFamily("Lfm2ShortConv", _CONV, _CONVOLUTION),
    "lfm2_moe": RecurrentFamily("Lfm2MoeShortConv", _CONV, _CONVOLUTION),
    "lfm3": RecurrentFamily("Lfm3ShortConv", _CONV, _CONVOLUTION),
    "mamba2": _mamba2("Mamba2Mixer"),
    "nemotron_h": _mamba2("NemotronHMamba2Mixer"),
    "olmo_hybrid": _gated_delta("OlmoHybridGatedDeltaNet"),
    "qwen3_5_moe_text": _gated_delta("Qwen3_5MoeGatedDeltaNet"),
    "qwen3_5_text": _gated_delta("Qwen3_5GatedDeltaNet"),
    "qwen3_next": _gated_delta("Qwen3NextGatedDeltaNet"),
    "zamba2": _mamba2("Zamba2MambaMixer", _HYBRID),
}
