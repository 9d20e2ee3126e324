"""Rows more than 2^31 elements away from the first need offsets of 64 bits."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import HeadOptions
from dpofast_kernels.head import finish_triton
from dpofast_kernels.head.fused_triton import FusedRows
from dpofast_kernels.head.launch import launch_table
from dpofast_kernels.head.rows_triton import TritonRows
from tests.kernels.head.cases import make_inputs

# The third row's offset passes 2^31, although the stride itself fits 32 bits.
STRIDE = 2**30 + 64


@pytest.fixture
def far_rows(tmp_path):
    """[3, 507] float32 rows STRIDE apart, in a sparse file. Nothing else of the file is touched."""
    numbers = 2 * STRIDE + 512
    path = tmp_path / "rows"
    with path.open("wb") as file:
        file.truncate(4 * numbers)
    whole = torch.from_file(str(path), shared=True, size=numbers)
    yield whole.as_strided((3, 507), (STRIDE, 1))
    del whole
    path.unlink()


@pytest.mark.parametrize("ops", [TritonRows, FusedRows])
@pytest.mark.parametrize("keep", [True, False])
def test_rows_far_apart(ops, keep, far_rows):
    inputs = make_inputs(torch.float32, lengths=(2, 1))
    arguments = (inputs.hidden_states.detach(), inputs.labels)
    row_ops = ops(inputs.weight.detach(), HeadOptions())
    expected = row_ops.score(*arguments, torch.empty(3, 512)[:, :507], keep)
    found = row_ops.score(*arguments, far_rows, keep)
    assert torch.equal(found.per_token_logps, expected.per_token_logps)
    if keep:
        coefficients = torch.tensor([0.5, -2.0, 1.0])
        made, wanted = (
            row_ops.differentiate(scored, inputs.labels, coefficients)
            for scored in (found, expected)
        )
        assert made.d_logits.data_ptr() == far_rows.data_ptr()
        assert torch.equal(made.d_logits, wanted.d_logits)


@pytest.mark.parametrize("max_rest", [finish_triton.MAX_REST, 0.0], ids=["once", "computed again"])
@pytest.mark.parametrize("hidden_size", [63, 64])
def test_weights_far_apart(hidden_size, max_rest, far_rows, monkeypatch):
    """A weight this large, read by each of the three fused kernels."""
    monkeypatch.setattr(finish_triton, "MAX_REST", max_rest)
    for name in ("score_tiles", "score_tiles_wide"):
        by_pointer = {**launch_table()["cpu"][name], "DESCRIPTORS": False}
        monkeypatch.setitem(launch_table()["cpu"], name, by_pointer)
    inputs = make_inputs(torch.float32, hidden_size=hidden_size, vocab_size=3, lengths=(2, 1))
    weight = far_rows[:, :hidden_size].copy_(inputs.weight.detach())  # [3, H]
    arguments = (inputs.hidden_states.detach(), torch.arange(3))
    expected = FusedRows(inputs.weight.detach(), HeadOptions()).score(*arguments, None, False)
    found = FusedRows(weight, HeadOptions()).score(*arguments, None, False)
    assert torch.equal(found.per_token_logps, expected.per_token_logps)
