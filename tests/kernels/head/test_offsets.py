"""Rows that lie more than 2^31 elements behind the first: offsets are of 64 bits."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import HeadOptions
from dpofast_kernels.head.fused_triton import FusedRows
from dpofast_kernels.head.rows_triton import TritonRows
from tests.kernels.head.cases import make_inputs

# The third row's offset passes 2^31, while the stride itself fits 32 bits.
STRIDE = 2**30 + 64


@pytest.fixture
def far_rows(tmp_path):
    """[3, 507] float32 rows STRIDE apart, in a sparse file of which only they are touched."""
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
        assert found.d_logits.data_ptr() == far_rows.data_ptr()
        assert torch.equal(found.d_logits, expected.d_logits)
