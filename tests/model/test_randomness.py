from __future__ import annotations

import pytest
import torch
from torch import nn

from dpofast.model.randomness import random_modules
from tests.support import tiny_llama, tiny_mixtral


class Noise(nn.Module):
    """Multiplies in place by random factors, in training mode only, as routers do."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size, self.limit = size, 0

    def forward(self, hidden_states):
        if self.training and hidden_states.shape[1] > self.limit:
            hidden_states *= 1 + self.size * torch.randn_like(hidden_states)
        return hidden_states


class Counter(nn.Module):
    """Changes its buffer in training mode, as batch norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden_states):
        if self.training:
            self.calls += 1
        return hidden_states


def in_the_first_mlp(model, module):
    """Puts a module behind the activation in the MLP of the model's first layer."""
    mlp = model.model.layers[0].mlp
    mlp.act_fn = nn.Sequential(mlp.act_fn, module)
    return model


@pytest.mark.parametrize("size", [1e-3, 0.5])
def test_the_module_that_draws_is_named(size):
    model = in_the_first_mlp(tiny_llama(), Noise(size))
    assert list(random_modules(model)) == ["model.layers.0.mlp.act_fn.1"]


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_look_leaves_no_trace(noise):
    counter = Counter()
    model = in_the_first_mlp(tiny_llama(), nn.Sequential(counter, Noise(noise))).eval()
    model.model.layers[1].train()
    modes = {name: module.training for name, module in model.named_modules()}
    generator = torch.get_rng_state()
    assert bool(random_modules(model)) == bool(noise)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert counter.calls == 0
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_noise(dtype):
    assert random_modules(tiny_mixtral().to(dtype).train()) == {}
