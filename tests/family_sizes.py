"""Fields that the configs of many tiny models share."""

from __future__ import annotations

from typing import Any

VOCAB_SIZE = 97
SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32}
BASE: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,  # fewer than the tokens of a packed row
    "attention_dropout": 0.0,
}
MULTI_HEAD = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
WINDOW = {"sliding_window": 6}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEAD_8 = {"head_dim": 8}
PAD = {**BASE, "pad_token_id": 0}
PAD_8 = {**PAD, **HEAD_8}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
FIRST_DENSE = {**ROUTED, "first_k_dense_replace": 1}
NUMBERED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
