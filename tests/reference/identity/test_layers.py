"""The identity of models whose layers differ in size or kind."""

from __future__ import annotations

import pytest
import torch

from dpofast.model.load import load_policy
from dpofast.reference.identity.model import model_identity
from tests.families import tiny_model


def digest(model):
    options = {"autocast_dtype": None, "attention": "eager", "head_version": 1}
    return model_identity(model, **options).digest


UNEVEN = ["gemma3n", "gemma4", "gemma4 with pictures", "laguna"]
STATEFUL = ["qwen3_5", "granitemoehybrid", "lfm3", "zamba2"]


@pytest.mark.parametrize(
    "family", [*UNEVEN, *(pytest.param(each, marks=pytest.mark.slow) for each in STATEFUL)]
)
def test_a_model_is_the_same_reference_in_memory_and_loaded(tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    assert digest(load_policy(str(tmp_path))) == digest(model)


@pytest.mark.parametrize("family", ["laguna", "gemma4 with pictures"])
def test_the_kind_of_one_layer_counts(family):
    """The weights stay the same, and the layer loses its window."""
    model, other = tiny_model(family), tiny_model(family)
    assert digest(model) == digest(other)
    config = other.config.get_text_config()
    config.layer_types = ["full_attention", *config.layer_types[1:]]
    same = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in same)
    assert digest(model) != digest(other)
