"""A policy that is random in training mode is refused by name, and not its store."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dpofast.errors import ModelError
from tests.model.test_randomness import Noise, in_the_first_mlp
from tests.support import make_trainer, tiny_llama, train


class Shift(nn.Module):
    """Computes something else in training mode, though nothing random."""

    def __init__(self) -> None:
        super().__init__()
        self.direction = torch.randn(48)

    def forward(self, hidden_states):
        return hidden_states + self.direction if self.training else hidden_states


def test_unknown_noise_is_named_before_anything_is_scored(tmp_path):
    trainer = make_trainer(tmp_path, in_the_first_mlp(tiny_llama(), Noise(0.01)))
    with pytest.raises(ModelError, match=r"Noise \(model.layers.0.mlp.act_fn.1\).*draws random"):
        trainer.train()
    assert trainer.reference.store.totals() is None
    assert math.isfinite(trainer.evaluate(trainer.train_dataset)["eval_loss"]), "no noise there"


def test_unknown_noise_is_trained_with_if_dropout_is_wanted(tmp_path):
    model = in_the_first_mlp(tiny_llama(), Noise(0.5))
    trainer = make_trainer(tmp_path, model, options={"disable_dropout": False, "layout": "padded"})
    losses = train(trainer)
    assert len(losses) == 6
    assert losses[0][0] != pytest.approx(math.log(2), abs=1e-4)


def test_noise_that_only_longer_sequences_get_is_named_at_the_first_batch(tmp_path):
    noise = Noise(0.5)
    noise.limit = 14  # tokens of a row; the look at the start takes fewer
    model = in_the_first_mlp(tiny_llama(), noise)
    wanted = make_trainer(tmp_path, model, options={"disable_dropout": False, "max_steps": 1})
    wanted.train()
    trainer = make_trainer(tmp_path, model)
    with pytest.raises(ModelError, match=r"first batch.*LlamaForCausalLM is random in training"):
        trainer.train()


def test_a_training_mode_that_differs_from_eval_mode_is_named_at_the_first_batch(tmp_path):
    trainer = make_trainer(tmp_path, in_the_first_mlp(tiny_llama(), Shift()))
    with pytest.raises(ModelError, match=r"first batch.*something else in training mode"):
        trainer.train()
