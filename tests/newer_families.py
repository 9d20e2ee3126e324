"""Tiny models of text families that transformers has added lately, and of some that are rare."""

from __future__ import annotations

from typing import Any

from tests.family_sizes import (
    BASE,
    EXPERTS,
    FIRST_DENSE,
    LATENT,
    MIXED,
    NUMBERED,
    PAD,
    PAD_8,
    ROUTED,
    SIZES,
    VOCAB_SIZE,
    WINDOW,
)

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONS = {**_ROPE, "mrope_section": [1, 1, 2]}
_ROPE_BY_TYPE = {
    "rope_parameters": {"full_attention": _SECTIONS, "sliding_attention": _SECTIONS},
}
_TWO_TYPES = {**PAD_8, **WINDOW, **MIXED}
PER_LAYER_INPUTS = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "num_kv_shared_layers": 2,
}
GEMMA3N: dict[str, Any] = {
    **{**PAD_8, **WINDOW, **PER_LAYER_INPUTS, "intermediate_size": [48, 48, 64, 64]},
    **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    **{"laurel_rank": 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
}
_GEMMA4 = {
    **{**PAD_8, **WINDOW, "global_head_dim": 16, "num_kv_shared_layers": 2},
    **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "use_double_wide_mlp": True,
}
# They run packed. The form is that of `families.py`.
NEWER_PACKABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "aria": (
        "AriaTextConfig",
        {**PAD_8, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),
    "axk1": ("AXK1Config", {**PAD, **LATENT, **FIRST_DENSE}),
    "beam": ("BeamConfig", {**_TWO_TYPES, **NUMBERED, "n_group": 1, "topk_group": 1}),
    "cohere_compass": ("CohereCompassTextConfig", {**_TWO_TYPES, **_ROPE_BY_TYPE}),
    "ctrl": (
        "CTRLConfig",
        {
            **{"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_head": 4, "n_layer": 2, "dff": 48},
            **{"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        },
    ),
    "dbrx": (
        "DbrxConfig",
        {
            **{"vocab_size": VOCAB_SIZE, "d_model": 32, "n_heads": 4, "n_layers": 2},
            **{"max_seq_len": 64, "rope_parameters": _ROPE},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4}
            | {"moe_top_k": 2},
        },
    ),
    "diffllama": ("DiffLlamaConfig", PAD_8),
    "flint": (
        "FlintConfig",
        {**_TWO_TYPES, **NUMBERED, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
    ),
    "gemma4_unified": ("Gemma4UnifiedTextConfig", _GEMMA4),
    "granitemoe_swa": ("GraniteMoeSWAConfig", {**PAD, **EXPERTS, **WINDOW, **MIXED}),
    "hrm": ("HrmTextConfig", PAD_8),
    "hy_v3": ("HYV3Config", {**PAD_8, **NUMBERED, "num_shared_experts": 1}),
    "hyperclovax": (
        "HyperCLOVAXConfig",
        {**PAD, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "iquestcoder": ("IQuestCoderConfig", PAD_8),
    "kolibri1": (
        "Kolibri1Config",
        {**_TWO_TYPES, **NUMBERED, "shared_expert_intermediate_size": 16},
    ),
    "laguna": (
        "LagunaConfig",
        {
            **{**_TWO_TYPES, **NUMBERED, "shared_expert_intermediate_size": 16},
            "num_attention_heads_per_layer": [4, 8, 4],
        },
    ),
    "mellum": ("MellumConfig", {**_TWO_TYPES, **NUMBERED}),
}
_INDEXER = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 16}
_INDEXED = {**PAD, **LATENT, **FIRST_DENSE, **_INDEXER}
_BYTES = {
    **{**SIZES, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2},
    "intermediate_size": 48,
}
_PATCHES = {**_BYTES, "hidden_size_global": 32, "cross_attn_k": 1}
_COMPRESSED = ("compressed_sparse_attention", "heavily_compressed_attention")
# They run padded: `model_types.py` says why.
NEWER_PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "axk2": ("AXK2Config", _INDEXED),
    "bailing_hybrid": ("BailingHybridConfig", {**PAD_8, **LATENT, **ROUTED, **NUMBERED}),
    "blt": (
        "BltConfig",
        {
            **{"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64, "patch_size": 4},
            **{"patch_in_forward": False, "cross_attn_k": 1, "patcher_config": _BYTES},
            **{"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [2]},
            **{"encoder_config": _PATCHES, "decoder_config": _PATCHES, "global_config": _BYTES},
        },
    ),
    "deepseek_v32": ("DeepseekV32Config", _INDEXED),
    "deepseek_v4": (
        "DeepseekV4Config",
        {**PAD_8, **ROUTED, "compress_rates": dict.fromkeys(_COMPRESSED, 4)},
    ),
    "dots3_note": (
        "Dots3NoteTextConfig",
        {
            **{**PAD_8, **LATENT, **ROUTED, **WINDOW, **_INDEXER},
            "shared_experts_intermediate_size": 16,
            # heads of the layers with a window
            **{"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
            **{"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
            **{"swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
        },
    ),
    "falcon_mamba": ("FalconMambaConfig", {**SIZES, "num_hidden_layers": 2, "state_size": 4}),
    "glm_moe_dsa": ("GlmMoeDsaConfig", _INDEXED),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseConfig",
        {**BASE, "intermediate_multiple_size": 2, "hidden_dropout": 0.0},
    ),
    "hy_v4": ("HYV4Config", _INDEXED),
    "minimax_m3": (
        "MiniMaxM3VLTextConfig",
        {
            **{**PAD_8, **EXPERTS, "moe_intermediate_size": 16, "index_head_dim": 8},
            **{"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]},
            **{"index_n_heads": 2, "index_block_size": 4, "index_topk_blocks": 2},
        },
    ),
    "moshi": ("MoshiConfig", {**PAD_8, **WINDOW, "ffn_dim": 48}),
    "openai-gpt": (
        "OpenAIGPTConfig",
        {
            **{"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_head": 4, "n_layer": 2},
            **{"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        },
    ),
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        {
            **{**PAD_8, **NUMBERED, "shared_expert_intermediate_size": 16, "hc_lowrank": 8},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        },
    ),
    "recurrent_gemma": ("RecurrentGemmaConfig", {**PAD_8, "attention_window_size": 6}),
    "rwkv": ("RwkvConfig", {**SIZES, "num_hidden_layers": 2, "context_length": 64}),
    "xlstm": ("xLSTMConfig", {**SIZES, "num_hidden_layers": 2, "num_heads": 4}),
    "zamba": (
        "ZambaConfig",
        {
            **{**PAD, "num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1},
            **{"mamba_d_state": 4, "n_mamba_heads": 2, "use_mamba_kernels": False},
            "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        },
    ),
    "zaya": (
        "ZayaConfig",
        {
            **{**PAD_8, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 1},
            "router_hidden_size": 8,
        },
    ),
}
_TOWER = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
}
_GOT = {
    **{"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 32, "patch_size": 8, "mlp_dim": 24, "global_attn_indexes": [0]},
}
_UNIFIED = {"patch_size": 4, "mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 16}
_AUDIO = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2},
    **{"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16},
    "nemo_conv_channels": 16,
}
_WHISPER = {
    **{"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16},
    **{"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16},
}
# Classes for pictures or sound as well as text, which run packed on text.
MULTIMODAL_PACKABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "fuyu": (
        "FuyuConfig",
        {
            "text_config": {**BASE, "model_type": "persimmon", "hidden_dropout": 0.0},
            **{**SIZES, "image_token_id": 96, "patch_size": 4},
        },
    ),
    "gemma3 with pictures": (
        "Gemma3Config",
        {
            **{"text_config": _TWO_TYPES, "vision_config": _TOWER, "mm_tokens_per_image": 1},
            **{"image_token_index": 96, "boi_token_index": 95, "eoi_token_index": 94},
        },
    ),
    "gemma4 with pictures": (
        "Gemma4Config",
        {
            "text_config": {**_GEMMA4, "hidden_size_per_layer_input": 8}
            | {"vocab_size_per_layer_input": VOCAB_SIZE},
            "vision_config": {**_TOWER, "head_dim": 8, "num_key_value_heads": 2, "patch_size": 4}
            | {"position_embedding_size": 16, "pooling_kernel_size": 2},
            "audio_config": None,
        },
    ),
    "gemma4_unified with pictures": (
        "Gemma4UnifiedConfig",
        {"text_config": _GEMMA4, "vision_config": _UNIFIED},
    ),
    "gemma3n with pictures": (
        "Gemma3nConfig",
        {
            "text_config": GEMMA3N,
            "vision_config": {"hidden_size": 16, "vocab_size": 3, "vocab_offset": 1000},
            "audio_config": {
                **{"hidden_size": 16, "vocab_size": 3, "vocab_offset": 2000, "input_feat_size": 16},
                **{"conf_num_hidden_layers": 1, "conf_num_attention_heads": 2},
                "sscp_conv_channel_size": (4, 4),
            },
            **{"image_token_id": 1001, "audio_token_id": 2001},
            **{"boi_token_id": 91, "eoi_token_id": 92, "boa_token_id": 93, "eoa_token_id": 94},
        },
    ),
    "got_ocr2": (
        "GotOcr2Config",
        {
            **{"text_config": {**BASE, "model_type": "qwen2"}, "vision_config": _GOT},
            "image_token_index": 96,
        },
    ),
    "moss_transcribe_diarize": (
        "MossTranscribeDiarizeConfig",
        {"text_config": {**PAD_8, "model_type": "qwen3"}, "audio_config": _WHISPER},
    ),
    "phi4_multimodal": (
        "Phi4MultimodalConfig",
        {
            **{**PAD, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "audio_config": _AUDIO},
            "vision_config": {**_TOWER, "crop_size": 28},
        },
    ),
}
MULTIMODAL_PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "git": (
        "GitConfig",
        {
            **{**PAD, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            "vision_config": _TOWER,
        },
    ),
}
