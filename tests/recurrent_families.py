"""Tiny models of families with layers that pass something on from token to token."""

from __future__ import annotations

from typing import Any

from tests.family_sizes import (
    EXPERTS,
    FIRST_DENSE,
    LATENT,
    NUMBERED,
    PAD,
    PAD_8,
    ROUTED,
    SIZES,
    WINDOW,
)

_DELTA = {
    **PAD_8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SHARED_EXPERT = {**NUMBERED, "shared_expert_intermediate_size": 16}
_CONV = {**PAD_8, "layer_types": ["conv", "full_attention", "conv"]}
# Chunks shorter than the sequences, so that states also pass from chunk to chunk.
_MAMBA2 = {
    **PAD,
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8},
}
# All of them run packed. The form is that of `families.py`.
RECURRENT_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("BambaConfig", {**_MAMBA2, "attn_layer_indices": [1]}),
    "falcon_h1": (
        "FalconH1Config",
        {**_MAMBA2, "mamba_d_ssm": 64, "ssm_multipliers": [0.5, 0.7, 1.3, 0.9, 1.1]},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_MAMBA2,
            **EXPERTS,
            "layer_types": _DELTA["layer_types"],
            "shared_intermediate_size": 16,
        },
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        {
            **{**PAD_8, **LATENT, **FIRST_DENSE, "q_lora_rank": None, "num_local_experts": 4},
            **{"layer_types": _DELTA["layer_types"], "linear_num_heads": 4, "linear_head_dim": 8},
        },
    ),
    "lfm2": ("Lfm2Config", _CONV),
    "lfm2_moe": ("Lfm2MoeConfig", {**_CONV, **NUMBERED, "num_dense_layers": 1}),
    "lfm3": (
        "Lfm3Config",
        {**_CONV, **WINDOW, "layer_types": ["conv", "sliding_attention", "full_attention"]},
    ),
    "mamba2": (
        "Mamba2Config",
        {
            **{**SIZES, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "pad_token_id": 0},
            **{"state_size": 8, "n_groups": 2, "chunk_size": 8},
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {key: value for key, value in {**PAD_8, **ROUTED}.items() if key != "num_hidden_layers"}
        | {"layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"]}
        | {"mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_n_groups": 1, "ssm_state_size": 8}
        | {"chunk_size": 8},
    ),
    "olmo_hybrid": ("OlmoHybridConfig", _DELTA),
    "qwen3_5": ("Qwen3_5TextConfig", _DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**_DELTA, **_SHARED_EXPERT}),
    "qwen3_next": ("Qwen3NextConfig", {**_DELTA, **_SHARED_EXPERT}),
    "zamba2": (
        "Zamba2Config",
        {
            **{**PAD, "num_hidden_layers": 4, "num_mem_blocks": 1, "chunk_size": 8},
            **{"layers_block_type": ["linear_attention", "hybrid"] * 2, "use_mem_rope": True},
            **{"n_mamba_heads": 4, "mamba_d_state": 8},
        },
    ),
}
