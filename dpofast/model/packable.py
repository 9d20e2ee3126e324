"""Chooses the layout for a model, and says why a model can't be packed."""

from __future__ import annotations

import logging

from torch import nn

from dpofast.data.packing.collate import Layout
from dpofast.errors import ConfigError
from dpofast.model.dropout import describe_noise, dropouts
from dpofast.model.layer_sizes import UnknownSizesError, attention_sizes
from dpofast.model.parts import ATTENTION_LAYERS, TOKENWISE_LAYERS, causal_lm
from dpofast.model.recurrent import recurrent_family, why_not_replaced
from dpofast.model.rope import depends_on_length

logger = logging.getLogger(__name__)

# Model types whose packed rows give the same as separate sequences. The tests compare hidden states
# and gradients for each of them, and every run compares its own model's hidden states again.
PACKABLE = frozenset(
    """
    afmoe apertus arcee bamba biogpt bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3
    dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_h1 flex_olmo gemma gemma2 gemma3_text
    gemma3n_text gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss
    granite granite_swa granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense
    hunyuan_v1_moe internlm3 jais2 jetmoe kimi_linear lfm2 lfm2_moe lfm3 llama longcat_flash mamba2
    mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mixtral nanochat nemotron_h olmo
    olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open starcoder2
    vaultgemma youtu zamba2
    """.split()  # noqa: SIM905  a list of them would fill pages
)
# Why some other model types can't be packed. State-space, convolution and chunked layers, which
# would carry tokens of one sequence into the next, are recognised by `layer_types` instead.
NOT_REPLACEABLE = "its attention can't be replaced"
NOT_TOLD = "its layers don't hand on to attention what it needs to know"
NOT_PACKABLE = {
    **dict.fromkeys(("codegen", "falcon", "gpt_neox_japanese", "gptj", "xglm"), NOT_REPLACEABLE),
    **dict.fromkeys(("bloom", "mpt"), f"{NOT_REPLACEABLE}, and its ALiBi counts along the row"),
    **dict.fromkeys(("nemotron", "stablelm"), NOT_TOLD),
    **dict.fromkeys(("doge", "gpt_neo"), "its attention is told what to look at by a mask alone"),
}


def choose_layout(wanted: str, model: nn.Module, pad_token_id: int) -> Layout:
    """Chooses the layout for a model.

    Args:
        wanted: "shared", "unshared", "padded", or "auto" for the fastest layout that gives right
            results for this model.
        model: the model as it will run; a dropout above 0 can't be packed.
        pad_token_id: fills the ends of padded rows.

    Raises:
        ConfigError: a packed layout is wanted but would be wrong for this model.
    """
    # Two runs of an answer that several pairs have would draw other noise.
    padded = Layout("padded", pad_token_id, merges=next(dropouts(model), None) is None)
    if wanted == "padded":
        return padded
    reason = why_not_packed(model)
    if reason is None:
        return Layout("shared" if wanted == "auto" else wanted, pad_token_id)
    if wanted != "auto":
        raise ConfigError(f"layout: {wanted!r} would be wrong here, as {reason}; use 'padded'.")
    logger.info("Layout: padded, as %s.", reason)
    return padded


def why_not_packed(model: nn.Module) -> str | None:
    """The reason why packed rows would be wrong for a model; None if they are right.

    The reason is the rest of a sentence that begins with "Layout: padded, as ".
    """
    lm = causal_lm(model)
    config = lm.config
    family = recurrent_family(lm)
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS - TOKENWISE_LAYERS
    if family is not None:
        others -= family.layer_types
    if others:
        return f"its layers of type {', '.join(sorted(others))} mix the sequences of a row"
    if config.model_type in NOT_PACKABLE:
        return NOT_PACKABLE[config.model_type]
    if config.model_type not in PACKABLE:
        return f"model type {config.model_type!r} isn't known to be right in packed rows"
    if getattr(config, "alibi", False):
        return "its ALiBi counts distances along the row"
    if depends_on_length(lm):
        return "its RoPE depends on the longest position of a row"
    if (reason := why_not_replaced(lm)) is not None:
        return reason
    # Our attention has no dropout of its own. In the layers outside attention, both answers would
    # get the same dropout on the prefix that they share, unlike in separate rows.
    if (noise := next(dropouts(model), None)) is not None:
        return describe_noise(*noise)
    return None


def attention_window(model: nn.Module) -> int | None:
    """Positions that a query sees in a layer with a sliding window, its own included.

    None if no layer has a window, or if the layers' sizes can't be told.
    """
    try:
        layers = attention_sizes(causal_lm(model).config.get_text_config())
    except UnknownSizesError:
        return None
    return min((layer.window for layer in layers if layer.window is not None), default=None)
