from __future__ import annotations

import pytest
import torch

from dpofast_kernels.rounding import product_precision
from tests.tf32 import Tf32

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_dtype_is_its_own(dtype):
    assert product_precision(dtype, CPU) == dtype


def test_tf32_is_found():
    with Tf32():
        assert product_precision(torch.float32, CPU) == torch.float16
        assert product_precision(torch.float64, CPU) == torch.float64


def test_bf16_is_found(monkeypatch):
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: mm(a.bfloat16().float(), b.bfloat16().float()))
    assert product_precision(torch.float32, CPU) == torch.bfloat16
