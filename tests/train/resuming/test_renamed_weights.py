"""Weights that are saved under other names than the model's own are loaded from a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpofast.errors import CheckpointError
from dpofast.train.resuming.renamed_weights import has_other_names, load_renamed
from tests.families import FAMILIES, VOCAB_SIZE, tiny_model
from tests.support import history, make_trainer, tiny_mixtral, token_pairs, train

# A mixture of experts; a class for pictures as well as text; two hybrids.
RENAMED = ("mixtral", "gemma3 with pictures", "granitemoehybrid", "olmo_hybrid")


@pytest.mark.parametrize(
    "family", [RENAMED[0], *(pytest.param(each, marks=pytest.mark.slow) for each in RENAMED[1:])]
)
def test_a_resumed_run_has_all_weights(tmp_path, family):
    pairs = token_pairs(4, vocab_size=VOCAB_SIZE)
    saving = {
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
        "router_aux_loss_coef": 0.0,
    }
    expected = train(make_trainer(tmp_path, tiny_model(family), pairs, options=saving))
    resumed = make_trainer(tmp_path, tiny_model(family), pairs, options=saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert history(resumed) == expected


@pytest.mark.slow
def test_the_best_model_has_all_weights(tmp_path):
    pairs = token_pairs(4)
    options = {
        **{"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
        **{"max_steps": 3, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
        "greater_is_better": True,  # so the best isn't the last
    }
    trainer = make_trainer(tmp_path, tiny_mixtral(), pairs, options=options, eval_dataset=pairs)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    expected = tiny_mixtral().from_pretrained(best).state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def all_changed(model):
    """A copy of a model with other weights."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 1.0
    return changed


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_dtype_is_kept(tmp_path, dtype):
    model = tiny_mixtral().to(dtype)
    model.model.norm.float()  # a model can have several
    model.save_pretrained(tmp_path)
    other = all_changed(model)
    load_renamed(other, str(tmp_path))
    for name, tensor in model.state_dict().items():
        assert other.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(other.state_dict()[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_every_family_has_known_names_or_is_loaded_by_others(tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    other = all_changed(model)
    if has_other_names(other, str(tmp_path)):
        load_renamed(other, str(tmp_path))
    else:  # as transformers' Trainer does
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_shards_are_read_too(tmp_path):
    model = tiny_mixtral()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    other = all_changed(model)
    assert has_other_names(other, str(tmp_path))
    load_renamed(other, str(tmp_path))
    assert torch.equal(next(other.parameters()), next(model.parameters()))


def test_a_weight_that_is_missing_is_an_error(tmp_path):
    model = tiny_mixtral()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of .*, such as model\.norm\.weight"):
        load_renamed(model, str(tmp_path))
