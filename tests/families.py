"""Tiny models of many families, with random weights large enough for every part to matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests.family_sizes import (
    BASE,
    EXPERTS,
    FIRST_DENSE,
    HEAD_8,
    LATENT,
    MIXED,
    MULTI_HEAD,
    NUMBERED,
    PAD,
    PAD_8,
    ROUTED,
    SIZES,
    VOCAB_SIZE,
    WINDOW,
)
from tests.gemma3n_tower import stand_in_for_its_tower
from tests.newer_families import (
    GEMMA3N,
    MULTIMODAL_PACKABLE,
    MULTIMODAL_PADDED,
    NEWER_PACKABLE,
    NEWER_PADDED,
    PER_LAYER_INPUTS,
)
from tests.recurrent_families import RECURRENT_FAMILIES
from tests.trained_only import TRAINED_ONLY

# Family: (transformers' class of its config, fields of that config).
PACKABLE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE),
    "qwen2": ("Qwen2Config", BASE),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 16}),
    "mistral with window": ("MistralConfig", {**BASE, **WINDOW}),
    "gemma2": (
        "Gemma2Config",
        {
            **BASE,
            **HEAD_8,
            **WINDOW,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3": ("Gemma3TextConfig", {**BASE, **HEAD_8, **WINDOW, **MIXED}),
    "phi3": (
        "Phi3Config",
        {**BASE, "pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "gpt_neox": ("GPTNeoXConfig", {**MULTI_HEAD, "hidden_dropout": 0.0}),
    "opt": (
        "OPTConfig",
        {**MULTI_HEAD, "ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32},
    ),
    "mixtral": ("MixtralConfig", {**BASE, **EXPERTS}),
    "gpt_oss": ("GptOssConfig", {**BASE, **HEAD_8, **WINDOW, **MIXED, **EXPERTS}),
    "olmo2": ("Olmo2Config", {**BASE, "pad_token_id": 0}),
}
# Fields for some of the other model types that run packed, listed in the same form further down.
_GPT2 = {
    **{"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LLAMA4 = {
    **{**PAD_8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "interleave_moe_layer_step": 2,
}
OTHER_PACKABLE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": (
        "AfmoeConfig",
        {**PAD_8, **NUMBERED, **WINDOW, **MIXED, "num_shared_experts": 1},
    ),
    "apertus": ("ApertusConfig", PAD),
    "arcee": ("ArceeConfig", PAD_8),
    "biogpt": (
        "BioGptConfig",
        {**PAD, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "bitnet": ("BitNetConfig", PAD),
    "cohere": ("CohereConfig", PAD),
    "cohere2": ("Cohere2Config", {**PAD, **WINDOW, **MIXED}),
    "cohere2_moe": ("Cohere2MoeConfig", {**PAD_8, **NUMBERED, **WINDOW, **MIXED}),
    "cwm": ("CwmConfig", {**PAD_8, **WINDOW, **MIXED, "rope_parameters": _LLAMA3}),
    "deepseek_v3": ("DeepseekV3Config", {**PAD, **LATENT, **FIRST_DENSE}),
    "deepseek_v2": ("DeepseekV2Config", {**PAD, **LATENT, **FIRST_DENSE}),
    "dots1": ("Dots1Config", {**PAD_8, **FIRST_DENSE, **WINDOW, **MIXED}),
    "ernie4_5": ("Ernie4_5Config", PAD_8),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {**PAD, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    ),
    "exaone4": ("Exaone4Config", {**PAD, **WINDOW, **MIXED}),
    "exaone_moe": (
        "ExaoneMoeConfig",
        {
            **{**PAD, **NUMBERED, **WINDOW, **MIXED},
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "flex_olmo": ("FlexOlmoConfig", {**PAD, "num_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("GemmaConfig", PAD_8),
    "gemma3n": ("Gemma3nTextConfig", GEMMA3N),
    # the layers differ in the size of heads and feed-forward, and the last two use others' keys
    "gemma4": (
        "Gemma4TextConfig",
        {
            **{**PAD_8, **WINDOW, **PER_LAYER_INPUTS, "global_head_dim": 16},
            **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
            "use_double_wide_mlp": True,
        },
    ),
    "gemma4 with experts": (
        "Gemma4TextConfig",
        {
            **{**PAD_8, **WINDOW, "global_head_dim": 16, "num_global_key_value_heads": 1},
            **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
            **{"attention_k_eq_v": True, "hidden_size_per_layer_input": 0},
            **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
            "moe_intermediate_size": 16,
        },
    ),
    "glm": ("GlmConfig", PAD_8),
    "glm4": ("Glm4Config", PAD_8),
    "glm4_moe": ("Glm4MoeConfig", {**PAD_8, **FIRST_DENSE}),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", {**PAD, **LATENT, **FIRST_DENSE}),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT2),
    "granite": ("GraniteConfig", {**PAD, "attention_multiplier": 0.3, "logits_scaling": 2.0}),
    "granite_swa": ("GraniteSWAConfig", {**PAD, **WINDOW, **MIXED}),
    "granitemoe": ("GraniteMoeConfig", {**PAD, **EXPERTS}),
    "granitemoeshared": (
        "GraniteMoeSharedConfig",
        {**PAD, **EXPERTS, "shared_intermediate_size": 16},
    ),
    "helium": ("HeliumConfig", PAD_8),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", PAD_8),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {**PAD_8, "num_experts": 4, "moe_topk": 2}),
    "internlm3": ("InternLM3Config", PAD_8),
    "jais2": ("Jais2Config", PAD_8),
    "jetmoe": ("JetMoeConfig", {**PAD, **EXPERTS, "kv_channels": 8}),
    "llama4": ("Llama4TextConfig", {**_LLAMA4, "attention_chunk_size": 8}),
    # layers without RoPE, whose queries' temperature depends on the position
    "llama4 with temperature": (
        "Llama4TextConfig",
        {
            **{**_LLAMA4, "attention_chunk_size": 5, "no_rope_layers": [1, 0, 1]},
            **{"floor_scale": 4, "attn_scale": 0.7},
        },
    ),
    "longcat_flash": (
        "LongcatFlashConfig",
        {
            **{**PAD_8, **LATENT, "num_layers": 2, "ffn_hidden_size": 48},
            **{"expert_ffn_hidden_size": 16, "n_routed_experts": 4, "zero_expert_num": 2},
            "moe_topk": 2,
        },
    ),
    "mimo_v2_flash": (
        "MiMoV2FlashConfig",
        {
            **{**PAD_8, **ROUTED, **WINDOW, **MIXED, "v_head_dim": 4},
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "minicpm3": ("MiniCPM3Config", {**PAD, **LATENT}),
    "minimax_m2": ("MiniMaxM2Config", {**PAD_8, **EXPERTS}),
    "ministral": ("MinistralConfig", {**PAD_8, **WINDOW, **MIXED}),
    "ministral3": ("Ministral3Config", {**PAD_8, "rope_parameters": _YARN}),
    "nanochat": ("NanoChatConfig", PAD),
    "olmo": ("OlmoConfig", PAD),
    "olmo3": ("Olmo3Config", {**PAD, **WINDOW, **MIXED}),
    "olmoe": ("OlmoeConfig", {**PAD, "num_experts": 4, "num_experts_per_tok": 2}),
    "persimmon": ("PersimmonConfig", {**MULTI_HEAD, "hidden_dropout": 0.0}),
    "phi": ("PhiConfig", {**PAD, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phimoe": ("PhimoeConfig", {**PAD_8, **EXPERTS}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**PAD, **NUMBERED, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**PAD_8, **NUMBERED}),
    "seed_oss": ("SeedOssConfig", {**PAD_8, "residual_dropout": 0.0}),
    "smollm3": ("SmolLM3Config", {**PAD, "no_rope_layer_interval": 2}),
    "solar_open": ("SolarOpenConfig", {**PAD_8, **ROUTED}),
    "starcoder2": ("Starcoder2Config", {**PAD, **WINDOW}),
    "vaultgemma": (
        "VaultGemmaConfig",
        {**PAD_8, **WINDOW, **MIXED, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    ),
    "youtu": ("YoutuConfig", {**PAD, **LATENT}),
    # variants of families above
    "llama3 rope": ("LlamaConfig", {**BASE, "rope_parameters": _LLAMA3}),
    "qwen2 with window": (
        "Qwen2Config",
        {**BASE, **WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "phi3 with window": ("Phi3Config", {**PACKABLE_FAMILIES["phi3"][1], **WINDOW}),
    "opt, norms last": (
        "OPTConfig",
        {**PACKABLE_FAMILIES["opt"][1], "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    **NEWER_PACKABLE,
}
UNPACKABLE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {**SIZES, "num_hidden_layers": 2, "state_size": 4}),
    "jamba": (
        "JambaConfig",
        {
            **BASE,
            "num_hidden_layers": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "pad_token_id": 0,
        },
    ),
    "bloom": (
        "BloomConfig",
        {**SIZES, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
}
# Families whose attention can't be replaced, or isn't told the layout.
DEAF_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": UNPACKABLE_FAMILIES["bloom"],
    "codegen": ("CodeGenConfig", {**_GPT2, "rotary_dim": 4}),
    "falcon": (
        "FalconConfig",
        {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout": 0.0},
    ),
    "gptj": ("GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "mpt": (
        "MptConfig",
        {"vocab_size": VOCAB_SIZE, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
    "nemotron": ("NemotronConfig", {**PAD, "hidden_dropout": 0.0}),
    "stablelm": ("StableLmConfig", {**PAD, "hidden_dropout": 0.0}),
}
# Families that call our attention, but would be wrong in packed rows.
MASKED_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "doge": ("DogeConfig", PAD),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            **{"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_layers": 2, "num_heads": 4},
            **{"attention_types": [[["global", "local"], 1]], "window_size": 6},
            **{"max_position_embeddings": 64, "embed_dropout": 0.0, "resid_dropout": 0.0},
        },
    ),
}
# Families that mix tokens outside of attention.
MIXING_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax": (
        "MiniMaxConfig",
        {**PAD_8, **EXPERTS, "layer_types": ["linear_attention", "full_attention"] * 2}
        | {"num_hidden_layers": 4, "block_size": 16},
    ),
}
FAMILIES = {
    **DEAF_FAMILIES,
    **MASKED_FAMILIES,
    **MIXING_FAMILIES,
    **PACKABLE_FAMILIES,
    **OTHER_PACKABLE_FAMILIES,
    **RECURRENT_FAMILIES,
    **UNPACKABLE_FAMILIES,
    **NEWER_PADDED,
    **MULTIMODAL_PACKABLE,
    **MULTIMODAL_PADDED,
    **TRAINED_ONLY,
}


def tiny_model(family: str, attention: str = "eager") -> Any:
    """Make a causal LM in float32, in training mode; skip the test if transformers is too old."""
    class_name, fields = FAMILIES[family]
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {transformers.__version__} is older than {family}")
    if class_name == "Gemma3nConfig":
        stand_in_for_its_tower()
    config = getattr(transformers, class_name)(**fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.12)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if any("expert" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # the grouped kernels take no float64
    return model.train()
