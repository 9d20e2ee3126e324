"""Padded rows give each sequence the RoPE of its own length, exactly as if it were alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dpofast.data.packing.collate import Layout
from dpofast.errors import ModelError
from dpofast.model.checks import check_model
from dpofast.model.forward import micro_batch, run_body
from dpofast.model.packable import choose_layout
from dpofast.model.rope import check_rope, depends_on_length
from tests.exactness import SHORT, assert_alike, laid_out, separate
from tests.families import OTHER_PACKABLE_FAMILIES, PACKABLE_FAMILIES, tiny_model
from tests.rope import KINDS, ORIGINAL_LENGTH, forgetful, ropes_of, stretched
from tests.support import float64_throughout, tiny_llama

PADDED = Layout("padded")
CPU = torch.device("cpu")
# Several kinds of RoPE in a module (gemma3), several modules (granite_swa), complex numbers
# (deepseek_v2), half of a head (phi), latent heads (minicpm3).
FAMILIES = ["llama", "phi3", "gemma3", "granite_swa", "deepseek_v2", "minicpm3", "phi"]
# These have no RoPE, or transformers can't make them with RoPE of both types.
WITHOUT = {"ctrl", "opt", "biogpt", "gpt2", "gpt_bigcode", "opt, norms last"}
BROKEN = {(family, "dynamic") for family in ("gpt_neox", "mimo_v2_flash", "phimoe", "mixtral")}
BROKEN |= {("mixtral", "longrope")}
OTHERS = [
    (family, kind)
    for family in sorted({*PACKABLE_FAMILIES, *OTHER_PACKABLE_FAMILIES} - WITHOUT - {*FAMILIES})
    for kind in KINDS
    if (family, kind) not in BROKEN
]


def long_ids(count):
    return torch.arange(count)[None] * 5 % 97


def compare_with_each_alone(model):
    lengths = {len(prompt) + len(answer) for prompt, answer in SHORT.sequences}
    assert min(lengths) < ORIGINAL_LENGTH < max(lengths)
    assert ORIGINAL_LENGTH in lengths
    with float64_throughout():
        with forgetful(model):
            expected = separate(model, SHORT)
        with torch.no_grad():
            model(long_ids(40))  # from here on, stock dynamic RoPE remembers 40 tokens
        found = laid_out(model, SHORT, PADDED)
    assert_alike(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_padded_rows_equal_sequences_alone(family, kind):
    model = stretched(family, kind).double()
    assert choose_layout("auto", model, 0) == PADDED
    check_model(copy.deepcopy(model), PADDED, CPU, None)
    compare_with_each_alone(model)


@pytest.mark.slow  # more than a hundred models, of which the ones above are a sample
@pytest.mark.parametrize(("family", "kind"), OTHERS)
def test_padded_rows_of_other_families_equal_sequences_alone(family, kind):
    compare_with_each_alone(stretched(family, kind).double())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_layers_are_computed_again_with_the_same_rope(kind, reentrant):
    model = stretched("llama", kind).double()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    compare_with_each_alone(model)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_would_be_wrong_with_stock_rope(kind):
    """The test above can fail: in stock transformers, the longest row decides for all."""
    model = stretched("llama", kind)
    short = long_ids(6)
    with torch.no_grad():
        alone = copy.deepcopy(model)(short).logits
        padded = torch.cat([torch.cat([short, short * 0, short * 0], 1), long_ids(18)])
        beside = model(padded).logits[:1, :6]
    assert (alone - beside).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_outside_a_micro_batch_the_model_is_stock_and_remembers_nothing_of_it(kind):
    model = stretched("llama", kind)
    (rope,) = ropes_of(model)
    before = copy.deepcopy(rope.__dict__)
    batch = PADDED.collate(SHORT.sequences)
    with torch.no_grad(), micro_batch(model, batch):
        assert "forward" in rope.__dict__
        run_body(model, batch)
    assert rope.__dict__.keys() == before.keys()
    for name in ("inv_freq", "original_inv_freq"):
        assert torch.equal(getattr(rope, name), before["_buffers"][name])
    assert rope.max_seq_len_cached == before["max_seq_len_cached"]
    with pytest.raises(RuntimeError, match="boom"), micro_batch(model, batch):
        raise RuntimeError("boom")
    assert rope.__dict__.keys() == before.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(40, 11), (40, 4), (40, 4, 40)])
def test_what_stock_forwards_left_behind_changes_nothing(kind, lengths):
    """After a short sequence, the original frequencies and the current ones are one tensor."""
    model, batch = stretched("llama", kind), PADDED.collate(SHORT.sequences)
    states = []
    for length in (None, *lengths):
        with torch.no_grad():
            if length:
                model(long_ids(length))
            with micro_batch(model, batch):
                states.append(run_body(model, batch))
    for state in states[1:]:
        assert torch.equal(state, states[0])


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn", "llama3"])
def test_other_types_of_rope_run_as_they_are(rope_type):
    rope = {
        **{"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0},
        **{"original_max_position_embeddings": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }
    model = tiny_llama(rope_parameters=rope)
    assert not depends_on_length(model)
    check_rope(model)
    (module,) = ropes_of(model)
    with micro_batch(model, PADDED.collate([([1], [2])])):
        assert "forward" not in module.__dict__


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rope_that_depends_on_lengths_unlike_its_config_is_refused(family, kind):
    model = stretched(family, kind)
    model.config = copy.deepcopy(model.config)  # the RoPE module keeps the old one
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    with pytest.raises(ModelError, match="RotaryEmbedding gives a sequence other angles beside"):
        check_model(model, PADDED, CPU, None)


class CachedRotaryEmbedding(nn.Module):
    """RoPE as models of old were written: it is told a length, and no positions."""

    def forward(self, x, seq_len=None):
        raise AssertionError


def test_rope_without_positions_is_refused():
    model = stretched("llama", "dynamic")
    model.model.layers[0].self_attn.rotary_emb = CachedRotaryEmbedding()
    with pytest.raises(ModelError, match="CachedRotaryEmbedding isn't called with position_ids"):
        check_model(model, PADDED, CPU, None)
    model = tiny_model("opt")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0}
    with pytest.raises(ModelError, match="OPTForCausalLM isn't called with position_ids"):
        check_rope(model)


class CompressedRotaryEmbedding(nn.Module):
    """RoPE that gives each second position only."""

    def __init__(self):
        super().__init__()
        self.inv_freq = nn.Buffer(torch.ones(4), persistent=False)

    def forward(self, x, position_ids):
        angles = position_ids[..., ::2, None] * self.inv_freq
        return angles.cos(), angles.sin()


def test_rope_with_results_of_another_shape_is_refused():
    model = stretched("llama", "dynamic")
    model.model.rotary_emb = CompressedRotaryEmbedding()
    batch = PADDED.collate(SHORT.sequences)
    message = r"results aren't those of padded rows.*own class"
    with pytest.raises(ModelError, match=message), micro_batch(model, batch):
        run_body(model, batch)
