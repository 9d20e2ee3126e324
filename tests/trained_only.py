"""Tiny models of types that are trained in tests, though not compared in float64.

XGLM can't make its mask in float64. The other one is an encoder, which its config makes a decoder.
"""

from __future__ import annotations

from typing import Any

from tests.family_sizes import PAD, VOCAB_SIZE

# The form is that of `families.py`.
TRAINED_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-generation": (
        "BertGenerationConfig",
        {
            **{**PAD, "is_decoder": True, "hidden_dropout_prob": 0.0},
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    "xglm": (
        "XGLMConfig",
        {
            **{"vocab_size": VOCAB_SIZE, "d_model": 32, "ffn_dim": 48, "num_layers": 2},
            **{"attention_heads": 4, "pad_token_id": 0, "max_position_embeddings": 64},
            **{"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
        },
    ),
}
