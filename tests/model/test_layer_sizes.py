"""Sizes of attention read from configs, against what each layer's attention is called with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dpofast.data.packing.collate import Layout
from dpofast.model.checks import check_layout
from dpofast.model.layer_sizes import (
    AttentionSize,
    StateSize,
    UnknownSizesError,
    attention_sizes,
    experts_per_token,
    num_experts,
    state_sizes,
)
from tests.families import OTHER_PACKABLE_FAMILIES, PACKABLE_FAMILIES, tiny_model
from tests.newer_families import MULTIMODAL_PACKABLE
from tests.recurrent_families import RECURRENT_FAMILIES

UNEVEN = (
    *("gemma3n", "gemma4", "gemma4 with experts", "mimo_v2_flash", "deepseek_v2", "gemma3"),
    *("laguna", "gemma4 with pictures", "llama4"),
)
OTHERS = {*PACKABLE_FAMILIES, *OTHER_PACKABLE_FAMILIES, *MULTIMODAL_PACKABLE, *RECURRENT_FAMILIES}

# Their layers run several times, attend in a way of their own, or hold all experts in one matrix.
WITHOUT = {"dbrx", "diffllama", "hrm"}


def check_sizes(family):
    model = tiny_model(family).double()
    calls = check_layout(Layout("unshared"), model)
    seen = [AttentionSize(c.num_heads, c.head_dim, c.value_dim, c.window, c.chunk) for c in calls]
    assert attention_sizes(model.config.get_text_config()) == seen


@pytest.mark.parametrize("family", UNEVEN)
def test_layers_of_different_sizes(family):
    check_sizes(family)


@pytest.mark.slow  # a model of every family
@pytest.mark.parametrize("family", sorted(OTHERS - WITHOUT))
def test_every_family_that_is_packed(family):
    check_sizes(family)


def config(**fields):
    return SimpleNamespace(**{"num_hidden_layers": 2, "hidden_size": 32, **fields})


def test_lists_with_a_size_per_layer():
    uneven = config(num_query_heads=[4, 8], head_dim=[16, 8])  # as OpenELM has them
    expected = [AttentionSize(4, 16, 16, None), AttentionSize(8, 8, 8, None)]
    assert attention_sizes(uneven) == expected


def test_configs_of_gemma_4_before_layers_had_views():
    older = config(
        num_attention_heads=4,
        head_dim=8,
        global_head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    )
    assert attention_sizes(older) == [AttentionSize(4, 8, 8, 6), AttentionSize(4, 16, 16, None)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_attention_heads": None},
        {"num_attention_heads": [4, 4, 4]},  # for another number of layers
        {"num_attention_heads": 4, "layer_types": ["full_attention"]},
        {"num_attention_heads": 4, "layer_types": ["full_attention", "mamba"]},
        {"num_attention_heads": 4, "num_hidden_layers": None},
    ],
)
def test_sizes_that_cannot_be_told(fields):
    with pytest.raises(UnknownSizesError):
        attention_sizes(config(**fields))


def test_sizes_of_states():
    fields = {"linear_key_head_dim": 8, "linear_value_head_dim": 16, "linear_num_value_heads": 4}
    types = ["linear_attention", "full_attention"]
    hybrid = config(model_type="qwen3_next", layer_types=types, num_attention_heads=4, **fields)
    assert state_sizes(hybrid) == [StateSize(4, 8, 16, 3)]
    assert attention_sizes(hybrid) == [AttentionSize(4, 8, 8, None)]
    hybrid.linear_num_value_heads = None
    with pytest.raises(UnknownSizesError, match="linear_num_value_heads of a layer is None"):
        state_sizes(hybrid)
    hybrid.model_type = "another"
    for sizes in (attention_sizes, state_sizes):
        with pytest.raises(UnknownSizesError, match="layers of type linear_attention aren't known"):
            sizes(hybrid)


def test_numbers_of_experts_under_other_names():
    assert num_experts(config(moe_num_experts=8)) == 8
    assert experts_per_token(config(num_experts_per_tok=None, top_k_experts=2)) == 2
    with pytest.raises(UnknownSizesError, match="num_local_experts or num_experts or"):
        num_experts(config())
    with pytest.raises(UnknownSizesError, match="some experts do nothing"):
        experts_per_token(config(moe_topk=2, zero_expert_num=1))
