"""The scaling cast of gradients: one product and one rounding, whatever the shape."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels.head.cast import scale_and_cast
from dpofast_kernels.head.cast_triton import CAST_OPTIONS, scale_cast_fwd

BLOCK = CAST_OPTIONS["B"]
FACTOR = 1.0 / 3.0


@pytest.mark.parametrize("factor", [FACTOR, torch.tensor(FACTOR).double()], ids=["number", "fp64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_product_and_one_rounding(dtype, factor):
    source = torch.randn(3, 7)
    out = torch.empty(3, 7, dtype=dtype)
    assert scale_and_cast(source, factor, out) is out
    assert torch.equal(out, (source * torch.tensor(FACTOR)).to(dtype))
    assert scale_and_cast(source, factor, source) is source


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_writes_every_element_and_no_other(size, dtype):
    # Few digits, because the interpreter truncates bf16 instead of rounding it.
    source = torch.arange(size).remainder(11).float() * 0.25
    memory = torch.full((size + 8,), 7.0, dtype=dtype)
    scale_cast_fwd(source, torch.tensor(-2.0).double(), memory[:size])
    assert torch.equal(memory[:size], (source * -2.0).to(dtype))
    assert torch.equal(memory[size:], torch.full((8,), 7.0, dtype=dtype))


def test_the_kernel_writes_in_place():
    source = torch.randn(5, 3)
    expected = source * 0.3
    assert scale_cast_fwd(source, 0.3, source) is source
    assert torch.equal(source, expected)
