"""The identity of a quantised model: everything that decides a log-prob, and nothing else."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from dpofast.errors import ModelError
from dpofast.reference.identity.model import model_identity
from dpofast.reference.identity.readable import readable_lines
from tests.quantised import KINDS, adapter, load, repacks_on_this_machine, save_base
from tests.support import make_trainer, token_pairs

IDS = torch.tensor([[5, 9, 2, 77, 30]])


def identify(model, **options):
    return model_identity(
        model, **{"autocast_dtype": None, "attention": "sdpa", "head_version": 1, **options}
    )


def digest(model, **options):
    return identify(model, **options).digest


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def models(base):
    return {kind: load(base, kind) for kind in KINDS}


@pytest.fixture
def model(request, models):
    return copy.deepcopy(models[request.param])


def layer(model):
    return model.model.layers[1].mlp.up_proj


def change_scale(name):
    def change(model):
        tensor = getattr(layer(model).weight.quant_state, name).view(-1)
        tensor[3] = tensor[3] + 1 if tensor.dtype == torch.uint8 else tensor[3] * 1.0001

    return change


def change_nested(name):
    def change(model):
        getattr(layer(model).weight.quant_state.state2, name).view(-1)[0] *= 1.0001

    return change


def set_state(name, value):
    return lambda model: setattr(layer(model).weight.quant_state, name, value)


def flip(model):
    layer(model).weight.data.view(torch.uint8).view(-1)[7] ^= 1


CHANGES = {
    ("nf4", "a nibble"): flip,
    ("nf4", "absmax"): change_scale("absmax"),
    ("nf4", "code"): change_scale("code"),
    ("nf4", "blocksize"): set_state("blocksize", 128),
    ("nf4", "type"): set_state("quant_type", "fp4"),
    ("nf4", "shape"): set_state("shape", torch.Size([64, 128])),
    ("nf4", "dtype"): set_state("dtype", torch.bfloat16),
    ("nf4", "compute dtype"): lambda m: setattr(layer(m), "compute_dtype", torch.bfloat16),
    ("nf4", "bias"): lambda m: m.model.layers[0].self_attn.q_proj.bias.data[0].add_(1e-3),
    ("nested", "absmax"): change_scale("absmax"),
    ("nested", "offset"): lambda m: layer(m).weight.quant_state.offset.mul_(1.0001),
    ("nested", "absmax of absmax"): change_nested("absmax"),
    ("nested", "code of absmax"): change_nested("code"),
    ("8bit", "a byte"): flip,
    ("8bit", "SCB"): lambda m: layer(m).weight.SCB[3].mul_(1.0001),
    ("8bit", "threshold"): lambda m: setattr(layer(m).state, "threshold", 5.0),
    ("8bit", "bias"): lambda m: m.model.layers[0].self_attn.q_proj.bias.data[0].add_(1e-3),
}


@pytest.mark.parametrize(
    ("model", "change"),
    [((kind), change) for (kind, _), change in CHANGES.items()],
    ids=[f"{kind} {what}" for kind, what in CHANGES],
    indirect=["model"],
)
def test_whatever_decides_a_log_prob_makes_another_reference(model, change):
    before = digest(model)
    change(model)
    assert digest(model) != before


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_loaded_twice_is_one_reference(base, models, kind):
    again = identify(load(base, kind))
    assert again == identify(models[kind])
    assert "quantization_config" not in again.description["config"]
    (line,) = [line for line in readable_lines(again.description) if line.startswith("quantised")]
    assert line.startswith(f"quantised: 14 of {'8' if kind == '8bit' else '4'}-bit")


def test_all_ways_of_quantising_are_different_references(base, models):
    digests = {digest(model) for model in models.values()}
    for model in models.values():
        digests.add(digest(copy.deepcopy(model).dequantize(dtype=torch.float32)))
    digests.add(digest(load(base, "nf4", bnb_4bit_compute_dtype=torch.bfloat16)))
    assert len(digests) == 2 * len(models) + 1


@pytest.mark.parametrize("model", ["nf4", "8bit"], indirect=True)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_state_that_a_first_pass_creates_or_casts_changes_nothing(model, autocast):
    before = digest(model, autocast_dtype=autocast)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        model.train()(IDS).logits.sum().backward()
    assert digest(model, autocast_dtype=autocast) == before


def test_the_dtype_of_the_storage_changes_nothing(base, models):
    stored = load(base, "nf4", bnb_4bit_quant_storage=torch.bfloat16)
    assert layer(stored).weight.dtype == torch.bfloat16
    assert identify(stored) == identify(models["nf4"])


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_a_saved_quantised_model_is_the_same_reference(tmp_path, model):
    before = identify(model)
    model.save_pretrained(tmp_path)
    assert identify(type(model).from_pretrained(tmp_path, dtype=torch.float32)) == before


@pytest.mark.parametrize("model", ["nested", "8bit"], indirect=True)
def test_an_adapter_counts_once_it_contributes(model):
    import peft

    before = digest(model)
    wrapped = peft.get_peft_model(model, adapter())
    assert digest(wrapped) == before
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert digest(wrapped) != before
    with wrapped.disable_adapter():
        assert digest(wrapped) == before


@pytest.mark.skipif(not repacks_on_this_machine(), reason="this CPU has no AVX512-BF16")
@pytest.mark.parametrize("model", ["nf4", "nested"], indirect=True)
def test_repacked_weights_are_refused(model):
    model.eval()
    with torch.no_grad():
        model(IDS)
    with pytest.raises(ModelError, match="repacked this 4-bit weight for inference"):
        digest(model)


def builds_that_differ_in_one_scale(folder, base, kind, count):
    """Log-probs of `count` builds: of a model, then of one with another scale in the same store."""
    found = []
    for number in range(count):
        model = load(base, kind)
        weight, index = layer(model).weight, number // 2
        scales = weight.SCB if kind == "8bit" else weight.quant_state.absmax
        scales[index] *= 1.0 + 1e-6 * (number % 2)
        store = folder / str(index)
        trainer = make_trainer(store, model, token_pairs(2), peft_config=adapter())
        trainer.score_datasets()
        found.append(trainer.train_set().ref_logps)
        report = trainer.reference.store.reports["train"]
        assert (report.rows_scored, report.rows_found) == (4, 0), number
    return found


@pytest.mark.parametrize("kind", ["nf4", "8bit"])
def test_references_that_differ_in_one_scale_share_no_row(tmp_path, base, kind):
    first, second = builds_that_differ_in_one_scale(tmp_path, base, kind, 2)
    np.testing.assert_allclose(first, second, rtol=1e-4)  # but for one scale, the same model


@pytest.mark.slow  # 40 builds
@pytest.mark.parametrize("kind", ["nf4", "8bit"])
def test_40_builds_of_references_that_differ_in_one_scale_share_no_row(tmp_path, base, kind):
    assert len(builds_that_differ_in_one_scale(tmp_path, base, kind, 40)) == 40
