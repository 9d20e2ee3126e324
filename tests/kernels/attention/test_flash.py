"""The code around flash attention on CUDA: bounds, windows, padded heads and the gather.

The kernels are emulated here. The tests on a GPU check the real ones.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dpofast_kernels.attention import AttentionOptions, flash
from dpofast_kernels.attention.chunks import attention_in_chunks
from tests.kernels.attention import emulated
from tests.kernels.attention.cases import (
    GROUPS,
    HEADS,
    MANY_TAILS,
    WINDOWS,
    Attention,
    Groups,
    as_op,
    assert_close,
    make_inputs,
    real_groups,
    run,
)

ROWS = {"pairs": GROUPS, "many tails": MANY_TAILS}


@pytest.fixture
def operator() -> Iterator[None]:
    """Give PyTorch's operators of flash attention an emulated kernel for CPUs; they have none."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", emulated.operator_forward)
    library.impl("_flash_attention_backward", emulated.operator_backward)
    yield
    library._destroy()


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put emulated modules in place of the packages."""

    def with_logsumexp(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return emulated.package_function(*args, **kwargs), None

    functions = {
        "flash_attn": emulated.package_function,
        "flash_attn_interface": with_logsumexp,
    }
    for name, function in functions.items():
        module = types.ModuleType(name)
        module.flash_attn_varlen_func = function
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("groups", ROWS.values(), ids=ROWS)
def test_varlen_equals_naive(groups: Groups, heads: str, window: int | None):
    inputs = make_inputs(groups, HEADS[heads])
    options = AttentionOptions(window=window)
    expected = run(inputs, AttentionOptions(window=window, backend="naive"))
    assert_close(run(inputs, options, as_op(flash.varlen_attention)), expected)


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_varlen_in_chunks_equals_naive(chunk: int):
    inputs = make_inputs(MANY_TAILS, HEADS["gqa"])
    attend = as_op(lambda call: attention_in_chunks(flash.varlen_attention, call, chunk))
    expected = run(inputs, AttentionOptions(chunk=chunk, backend="naive"))
    assert_close(run(inputs, AttentionOptions(chunk=chunk), attend), expected)


@pytest.mark.usefixtures("operator")
def test_varlen_on_real_lengths():
    inputs = make_inputs(real_groups(3, skip=10), HEADS["gqa"])
    options = AttentionOptions(scale=0.5, window=100)
    expected = run(inputs, AttentionOptions(scale=0.5, window=100, backend="sdpa"))
    assert_close(run(inputs, options, as_op(flash.varlen_attention)), expected)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("attention", "softcap"),
    [
        (flash.flash3_attention, None),
        (flash.flash_attn_attention, None),
        (flash.flash_attn_attention, 0.8),
    ],
)
def test_packages_equal_naive(
    attention: Attention, softcap: float | None, heads: str, window: int | None
):
    inputs = make_inputs(GROUPS, HEADS[heads])
    options = AttentionOptions(window=window, softcap=softcap)
    expected = run(inputs, AttentionOptions(window=window, softcap=softcap, backend="naive"))
    assert_close(run(inputs, options, as_op(attention)), expected)
