"""Which layout is right for a model, and why."""

from __future__ import annotations

import logging

from torch import nn

from dpofast.data.packing.collate import Layout
from dpofast.errors import ConfigError
from dpofast.model.dropout import dropouts
from dpofast.model.parts import causal_lm

logger = logging.getLogger(__name__)

# Model types whose packed rows give what separate sequences give: hidden states and gradients were
# compared for each. Every run compares its own model's hidden states again.
PACKABLE = frozenset(
    """
    afmoe apertus arcee biogpt bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3 dots1
    ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe
    glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoeshared
    helium hunyuan_v1_dense hunyuan_v1_moe internlm3 jais2 jetmoe llama longcat_flash mimo_v2_flash
    minicpm3 minimax_m2 ministral ministral3 mistral mixtral nanochat olmo olmo2 olmo3 olmoe opt
    persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2
    vaultgemma youtu
    """.split()  # noqa: SIM905  a list of them would fill pages
)
# Why others aren't among them. State-space, convolution and chunked layers would carry one
# sequence's tokens into the next; those are known by `layer_types`, or by the names below.
NOT_REPLACEABLE = "its attention can't be replaced"
NOT_TOLD = "its layers don't hand on to attention what it needs to know"
NOT_PACKABLE = {
    **dict.fromkeys(("codegen", "falcon", "gpt_neox_japanese", "gptj", "xglm"), NOT_REPLACEABLE),
    **dict.fromkeys(("bloom", "mpt"), f"{NOT_REPLACEABLE}, and its ALiBi counts along the row"),
    **dict.fromkeys(("nemotron", "stablelm"), NOT_TOLD),
    **dict.fromkeys(("doge", "gpt_neo"), "its attention is told what to look at by a mask alone"),
    "phimoe": "its routers draw experts at random while it is trained",
}
# Layers that look at other tokens by attention alone.
PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
# RoPE whose frequencies depend on the longest position of a row.
ROW_DEPENDENT_ROPE = {"dynamic", "longrope"}


def choose_layout(wanted: str, model: nn.Module, pad_token_id: int) -> Layout:
    """The layout for a model: what was asked for, or the best that is right for it.

    Args:
        wanted: "auto", "shared", "unshared" or "padded".
        model: as it will run: its dropouts count.
        pad_token_id: for padded rows.

    Raises:
        ConfigError: a packed layout was asked for, and would be wrong for this model.
    """
    if wanted == "padded":
        return Layout("padded", pad_token_id)
    reason = why_not_packed(model)
    if reason is None:
        return Layout("shared" if wanted == "auto" else wanted, pad_token_id)
    if wanted != "auto":
        raise ConfigError(f"layout: {wanted!r} would be wrong here, as {reason}; use 'padded'.")
    logger.info("Layout: padded, as %s.", reason)
    return Layout("padded", pad_token_id)


def why_not_packed(model: nn.Module) -> str | None:
    """Why packed rows would be wrong for a model, or None where they are right."""
    lm = causal_lm(model)
    config = lm.config
    others = set(getattr(config, "layer_types", None) or ()) - PACKABLE_LAYERS
    if others:
        return f"its layers of type {', '.join(sorted(others))} mix the sequences of a row"
    if config.model_type in NOT_PACKABLE:
        return NOT_PACKABLE[config.model_type]
    if config.model_type not in PACKABLE:
        return f"model type {config.model_type!r} isn't known to be right in packed rows"
    if getattr(config, "alibi", False):
        return "its ALiBi counts distances along the row"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {str(rope.get("rope_type", ""))} | {
        str(each.get("rope_type", "")) for each in rope.values() if isinstance(each, dict)
    }
    if kinds & ROW_DEPENDENT_ROPE:
        return "its RoPE depends on the longest position of a row"
    if (dropout := next(dropouts(model), None)) is not None:
        return f"{type(dropout[0]).__name__} has a dropout above 0"
    return None


def attention_window(model: nn.Module) -> int | None:
    """How many positions layers with a sliding window see, the query's own included, or None."""
    config = causal_lm(model).config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]
    window: int | None = getattr(config, "sliding_window", None)
    return window if "sliding_attention" in layer_types else None
