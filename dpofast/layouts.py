"""Which layout is right for a model, and why."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.attention import AttentionCalls, packed_attention
from dpofast.data.batch import PackedPairs, collate_padded
from dpofast.data.layout import Layout
from dpofast.errors import ConfigError
from dpofast.model import body_of, causal_lm, dropouts, evaluating

logger = logging.getLogger(__name__)

# Model types whose packed rows give what separate sequences give: hidden states and gradients were
# compared for each. Every run compares its own model's hidden states again.
PACKABLE = frozenset(
    """
    afmoe apertus arcee bitnet cohere cohere2 cohere2_moe cwm deepseek_v3 ernie4_5 ernie4_5_moe
    exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode
    gpt_neox gpt_oss granite granitemoe granitemoeshared helium internlm3 jetmoe llama
    longcat_flash mimo_v2_flash minicpm3 minimax_m2 ministral3 mistral mixtral nanochat olmo
    olmo2 olmo3 olmoe opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3
    solar_open starcoder2 vaultgemma youtu
    """.split()  # noqa: SIM905  a list of them would fill pages
)
# Layers that look at other tokens by attention alone. State-space, convolution and chunked layers
# would carry one sequence's tokens into the next.
PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
# RoPE whose frequencies depend on the longest position of a row.
ROW_DEPENDENT_ROPE = {"dynamic", "longrope"}
# Packed and padded hidden states may differ by this much of their size, by rounding alone.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


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
    if config.model_type not in PACKABLE:
        return f"model type {config.model_type!r} isn't known to be right in packed rows"
    others = set(getattr(config, "layer_types", None) or ()) - PACKABLE_LAYERS
    if others:
        return f"its layers of type {', '.join(sorted(others))} mix the sequences of a row"
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


def check_layout(layout: Layout, model: nn.Module) -> None:
    """Compare a packed row's hidden states with those of padded rows, on a few tokens.

    Raises:
        ConfigError: they differ, or a layer doesn't call our attention.
    """
    if not layout.is_packed:
        return
    vocab_size = causal_lm(model).get_input_embeddings().weight.shape[0]
    ids = [(7 * index + 1) % vocab_size for index in range(14)]
    # two pairs; the second one's answers begin alike
    sequences = [
        (ids[:5], ids[5:9]),
        (ids[:5], ids[9:12]),
        (ids[2:4], ids[6:12]),
        (ids[2:4], [*ids[6:8], *ids[1:4]]),
    ]
    before = AttentionCalls.count
    packed = _scored_states(model, layout.collate(sequences))
    calls = AttentionCalls.count - before
    padded = _scored_states(model, collate_padded(sequences))
    error = ((packed - padded).norm() / padded.norm().clamp_min(1e-12)).item()
    dtype = causal_lm(model).get_output_embeddings().weight.dtype
    if calls == 0 or not error <= TOLERANCE[dtype]:
        raise ConfigError(
            f"layout: {layout.name} rows give {type(causal_lm(model)).__name__} other hidden "
            f"states than padded ones (by {error:.1%}); use layout: padded, and please report "
            "this model type."
        )


@torch.no_grad()
def _scored_states(model: nn.Module, batch: PackedPairs) -> Tensor:
    """[N, H] float32 hidden states that predict the labels."""
    lm: Any = causal_lm(model)
    batch = batch.to(next(lm.parameters()).device)
    inputs: dict[str, Any] = {}
    if batch.shared_layout is not None:
        inputs = {"position_ids": batch.position_ids, "shared_layout": batch.shared_layout}
    with evaluating(lm), packed_attention(lm.config, batch.shared_layout):
        hidden_states = body_of(lm)(input_ids=batch.input_ids, use_cache=False, **inputs)[0]
    return hidden_states.flatten(0, 1).index_select(0, batch.rows).float()
