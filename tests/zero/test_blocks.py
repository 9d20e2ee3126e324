"""Models that aren't sharded, or pretend to be; tests/distributed shards them with ZeRO-3."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dpofast.zero import blocks
from tests.support import tiny_llama


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_model_that_is_not_sharded_is_left_unchanged():
    model = tiny_llama()
    with blocks.in_blocks(model):
        assert num_hooks(model) == 0


@pytest.fixture
def gathered(monkeypatch):
    """Pretends that all tensors are sharded; a list of those that are gathered at the moment."""
    here = []

    @contextlib.contextmanager
    def gathering(tensors):
        mine = [tensor for tensor in tensors if all(tensor is not other for other in here)]
        here.extend(mine)
        yield
        del here[len(here) - len(mine) :]

    monkeypatch.setattr(blocks, "spread", list)
    monkeypatch.setattr(blocks, "gathering", gathering)
    return here


def test_each_forward_has_only_the_weights_of_its_block(gathered):
    model = tiny_llama(num_hidden_layers=3)
    seen = {}
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: seen.update({name: len(gathered)}))
    with blocks.in_blocks(model):
        model(input_ids=torch.tensor([[1, 2]]))
        assert gathered == []
    ends = {"model.embed_tokens": 1, "model.norm": 1, "lm_head": 1}
    assert {name: count for name, count in seen.items() if name in ends} == ends
    of_layer = len(list(model.model.layers[0].parameters()))
    assert {count for name, count in seen.items() if ".layers." in name} == {of_layer}


def test_an_exception_in_a_forward_removes_hooks_and_releases_weights(gathered):
    model = tiny_llama()
    model.model.layers[1].mlp.forward = interrupted
    before = num_hooks(model)
    with pytest.raises(KeyboardInterrupt), blocks.in_blocks(model):
        model(input_ids=torch.tensor([[1, 2]]))
    assert gathered == []
    assert num_hooks(model) == before


def interrupted(*_):
    raise KeyboardInterrupt
