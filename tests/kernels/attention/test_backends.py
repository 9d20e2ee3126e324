"""Which back end runs on which machine, and for which reason another one does not."""

from __future__ import annotations

import sys

import pytest
import torch

from dpofast_kernels.attention import AttentionOptions, backend_for, backends, shared_attention
from dpofast_kernels.attention.backends import Machine, choose_backend
from tests.kernels.attention.cases import GROUPS, HEADS, make_inputs

SINKS = torch.zeros(4)
ALL = frozenset({"flash_attn", "flash_attn_interface"})
CPU = Machine("cpu")
TURING = Machine("cuda", capability=(7, 5), packages=ALL)
AMPERE = Machine("cuda", capability=(8, 0))
AMPERE_ALL = Machine("cuda", capability=(8, 0), packages=ALL)
HOPPER = Machine("cuda", capability=(9, 0))
HOPPER_ALL = Machine("cuda", capability=(9, 0), packages=ALL)
BLACKWELL_ALL = Machine("cuda", capability=(10, 0), packages=ALL)
ROCM = Machine("cuda", is_rocm=True, capability=(9, 4), packages=ALL)
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("machine", "dtype", "head_dim", "options", "expected"),
    [
        (CPU, FP32, 64, {}, "sdpa"),
        (CPU, FP64, 64, {"window": 3}, "sdpa"),
        (CPU, BF16, 64, {"softcap": 5.0}, "plain"),
        (CPU, FP32, 64, {"sinks": SINKS}, "plain"),
        (HOPPER, BF16, 128, {"window": 3}, "varlen"),
        (HOPPER_ALL, BF16, 128, {"window": 3}, "flash3"),
        (HOPPER_ALL, BF16, 264, {}, "flex"),
        (HOPPER_ALL, BF16, 128, {"softcap": 5.0}, "flash_attn"),
        (HOPPER, torch.float16, 128, {"softcap": 5.0}, "flex"),
        (HOPPER_ALL, BF16, 128, {"sinks": SINKS}, "flex"),
        (HOPPER_ALL, BF16, 128, {"sinks": SINKS, "softcap": 5.0}, "flex"),
        (HOPPER_ALL, FP32, 128, {}, "flex"),
        (HOPPER_ALL, FP64, 128, {}, "sdpa"),
        (HOPPER_ALL, FP64, 128, {"sinks": SINKS}, "plain"),
        (AMPERE, BF16, 128, {}, "varlen"),
        (AMPERE_ALL, BF16, 128, {}, "varlen"),
        (BLACKWELL_ALL, BF16, 128, {}, "varlen"),
        (TURING, torch.float16, 128, {}, "flex"),
        (ROCM, BF16, 128, {}, "flex"),
    ],
)
def test_choice(machine: Machine, dtype: torch.dtype, head_dim: int, options: dict, expected: str):
    assert choose_backend(machine, dtype, head_dim, AttentionOptions(**options)) == expected
    by_name = AttentionOptions(**options, backend=expected)
    assert choose_backend(machine, dtype, head_dim, by_name) == expected


@pytest.mark.parametrize(
    ("backend", "machine", "dtype", "options", "reason"),
    [
        ("varlen", CPU, BF16, {}, "runs on CUDA alone, not on cpu"),
        ("varlen", ROCM, BF16, {}, "not on ROCm"),
        ("varlen", TURING, BF16, {}, "compute capability 8 or above, and this is 7"),
        ("varlen", HOPPER, FP32, {}, "takes float16 and bfloat16, not torch.float32"),
        ("varlen", HOPPER, BF16, {"softcap": 5.0}, "knows no softcap"),
        ("flash3", HOPPER, BF16, {}, "package flash_attn_interface isn't installed"),
        ("flash3", AMPERE_ALL, BF16, {}, r"capability 9 \(Hopper\), and this is 8"),
        ("flash3", HOPPER_ALL, BF16, {"softcap": 5.0}, "knows no softcap"),
        ("flash_attn", HOPPER, BF16, {}, "package flash_attn isn't installed"),
        ("flash_attn", HOPPER_ALL, BF16, {"sinks": SINKS}, "knows no sinks"),
        ("flex", CPU, FP32, {}, "no backward on cpu"),
        ("flex", HOPPER, FP64, {}, "no float64"),
        ("sdpa", CPU, FP32, {"softcap": 5.0}, "no softcap and no sinks"),
    ],
)
def test_a_wish_that_cannot_be_met_raises(
    backend: str, machine: Machine, dtype: torch.dtype, options: dict, reason: str
):
    options = AttentionOptions(**options, backend=backend)
    with pytest.raises(ValueError, match=f"backend '{backend}' was asked for.*{reason}"):
        choose_backend(machine, dtype, 128, options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize(
    ("source", "usable"),
    [
        ("def flash_attn_varlen_func(): ...", True),
        ("def flash_attn_func(): ...", False),  # another package with the same name
        ("raise ImportError('undefined symbol: built for another PyTorch')", False),
        (None, False),
    ],
)
def test_a_package_counts_where_it_can_be_used(tmp_path, monkeypatch, source, usable):
    if source is not None:
        (tmp_path / "flash_attn_interface.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    found = backends.machine_of.__wrapped__(torch.device("cuda"))
    sys.modules.pop("flash_attn_interface", None)
    assert ("flash_attn_interface" in found.packages) == usable
    expected = "flash3" if usable else "varlen"
    assert choose_backend(found, BF16, 128, AttentionOptions()) == expected


def test_the_op_says_why():
    inputs = make_inputs(GROUPS, HEADS["mha"])
    states = (inputs.query, inputs.key, inputs.value)
    with pytest.raises(ValueError, match="'varlen' was asked for"):
        shared_attention(*states, inputs.layout, AttentionOptions(backend="varlen"))
    assert backend_for(inputs.query, inputs.value) == "sdpa"
    assert backend_for(inputs.query, inputs.value, AttentionOptions(softcap=1.0)) == "plain"
