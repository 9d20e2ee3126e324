"""Tiny models of many families, with random weights so large that every part of them matters."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB_SIZE = 97
SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32}
BASE: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
}
MULTI_HEAD = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
WINDOW = {"sliding_window": 6}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEAD_8 = {"head_dim": 8}

# family -> (class of its config in transformers, fields)
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
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **BASE,
            **HEAD_8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "bloom": (
        "BloomConfig",
        {**SIZES, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
}
FAMILIES = {**PACKABLE_FAMILIES, **UNPACKABLE_FAMILIES}


def tiny_model(family: str, attention: str = "eager") -> Any:
    """A causal LM in float32, in training mode."""
    class_name, fields = FAMILIES[family]
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
