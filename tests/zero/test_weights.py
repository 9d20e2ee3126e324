"""Weights under DeepSpeed; tests/distributed shards them over two ranks with ZeRO-3."""

from __future__ import annotations

import pytest
import torch

from dpofast.zero.weights import cast_weights, gathered, spread
from tests.support import tiny_llama


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, torch.bfloat16),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": True}}, torch.float16),
        ({"bf16": {"enabled": False}}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_parameters_get_the_precision_that_deepspeed_trains_in(config, dtype):
    model = tiny_llama()
    cast_weights(model, config)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    # DeepSpeed's engine leaves RoPE's frequencies in float32, too.
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_a_tensor_that_is_not_sharded_is_whole():
    model = tiny_llama()
    assert spread(model.parameters()) == []
    with gathered(model.lm_head.weight) as weight:
        assert weight is model.lm_head.weight
