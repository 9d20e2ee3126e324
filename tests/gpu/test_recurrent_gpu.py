"""Layers with a state in packed rows on a GPU, with the kernels that are installed there."""

from __future__ import annotations

import pytest
import torch

from dpofast.data.packing.collate import Layout
from dpofast.data.packing.padded_rows import collate_padded
from dpofast.model.checks import check_model
from dpofast.model.forward import micro_batch, run_body
from tests.exactness import SHORT
from tests.families import FAMILIES, tiny_model

DEVICE = torch.device("cuda")
# flash-linear-attention's kernels take heads of 16 and more.
HEADS = {
    "qwen3_5": {"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "kimi_linear": {"linear_head_dim": 16},
    "bamba": {},
    "lfm2": {},
}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-2), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("family", HEADS)
def test_packed_rows_equal_padded_rows(monkeypatch, family, dtype, tolerance):
    """The log's line about layers with a state says which kernels ran: `pytest -s` shows it."""
    class_name, fields = FAMILIES[family]
    monkeypatch.setitem(FAMILIES, family, (class_name, {**fields, **HEADS[family]}))
    model = tiny_model(family).to(DEVICE, dtype)
    print(*check_model(model, Layout("shared"), DEVICE, None), sep="\n")

    def gradients(batch):
        batch = batch.to(DEVICE)
        model.zero_grad()
        with micro_batch(model, batch):
            states = run_body(model, batch).flatten(0, 1)[batch.scored_positions]
            generator = torch.Generator().manual_seed(0)
            factors = torch.randn(states.shape, generator=generator).to(states)
            (states * factors).square().sum().backward()
        # a parameter without a gradient has no part in the hidden states
        return torch.cat(
            [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        )

    found = gradients(Layout("shared").collate(SHORT.sequences))
    expected = gradients(collate_padded(SHORT.sequences))
    assert (found - expected).norm() <= tolerance * expected.norm()
