"""Names in transformers' list of causal LMs that aren't the type of a loaded model."""

from __future__ import annotations

# Their configs hold a text config, and the model that is loaded is of its type; or another name of
# a type's config.
ALIASES = {
    "dots3_note": "dots3_note_text",
    "emu3": "emu3_text_model",
    "gpt-sw3": "gpt2",
    "llama4": "llama4_text",
    "mllama": "mllama_text_model",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
}


def type_when_loaded(name: str) -> str:
    """The model type of the causal LM that transformers loads for a name."""
    return ALIASES.get(name, name)
