"""The real GPU back ends of attention, compared with the naive one in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpofast_kernels.attention import AttentionOptions, backend_for, probe
from dpofast_kernels.attention.backends import machine_of
from tests.kernels.attention.cases import Heads, Inputs, make_inputs, real_groups, relative_errors
from tests.kernels.attention.cases import run as run_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

# Prefixes and tails within a block of the kernels and across several, with empty tails.
GROUPS = ((300, (200, 513)), (17, (0, 40)), (64, (128, 127, 0, 9)), (1, (1, 2)), (5, (0,)))
HEADS = {
    "mha": Heads(4, 4, 64, 64),
    "gqa": Heads(14, 2, 64, 64),
    "odd": Heads(6, 2, 100, 100),
    "narrow values": Heads(4, 4, 192, 128),
    "small": Heads(4, 1, 8, 8),
}
WINDOWS = (None, 1, 30, 128)
BACKENDS = ("varlen", "flash3", "flash_attn", "flex")


def errors(inputs: Inputs, options: AttentionOptions, with_sinks: bool) -> dict[str, float]:
    """Relative errors of the output and all gradients."""
    got = run_attention(inputs, options, with_sinks=with_sinks)
    exact = inputs.to("cuda", torch.float64)
    expected = run_attention(exact, replace(options, backend="naive"), with_sinks=with_sinks)
    if options.window == 1 and not with_sinks:
        for name in ("query", "key"):  # the true values are 0, so there is no relative error
            assert got.pop(name).abs().max() < 0.1
            del expected[name]
    return relative_errors(got, expected)


def check(backend: str, inputs: Inputs, options: AttentionOptions, with_sinks: bool) -> None:
    """Compare a back end with the naive one; skip if it can't run on this machine."""
    options = replace(options, backend=backend)
    sinks = inputs.sinks if with_sinks else None
    try:
        backend_for(inputs.query, inputs.value, replace(options, sinks=sinks))
    except ValueError as error:
        pytest.skip(str(error))
    allowed = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}[inputs.query.dtype]
    found = errors(inputs, options, with_sinks)
    assert max(found.values()) < allowed, found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_naive(backend: str, heads: str, window: int | None, dtype: torch.dtype):
    inputs = make_inputs(GROUPS, HEADS[heads], dtype).to("cuda", dtype)
    check(backend, inputs, AttentionOptions(window=window), with_sinks=False)


@pytest.mark.parametrize("chunk", [3, 64, 130])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks(backend: str, chunk: int):
    inputs = make_inputs(GROUPS, HEADS["gqa"], torch.bfloat16).to("cuda", torch.bfloat16)
    check(backend, inputs, AttentionOptions(chunk=chunk), with_sinks=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(2.0, False), (None, True), (2.0, True)])
@pytest.mark.parametrize("backend", ["flash_attn", "flex"])
def test_softcap_and_sinks(
    backend: str, softcap: float | None, with_sinks: bool, window: int | None, dtype: torch.dtype
):
    inputs = make_inputs(GROUPS, HEADS["gqa"], dtype).to("cuda", dtype)
    check(backend, inputs, AttentionOptions(window=window, softcap=softcap), with_sinks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows_one_after_the_other(backend: str):
    """Rows of different lengths: what is compiled or cached for one must not serve another."""
    for skip in range(0, 12, 2):
        inputs = make_inputs(real_groups(2, skip=skip), HEADS["mha"], torch.bfloat16)
        inputs = inputs.to("cuda", torch.bfloat16)
        for window in (None, 100):
            check(backend, inputs, AttentionOptions(window=window), with_sinks=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 4096}, {"chunk": 8192}, {"softcap": 50.0}, {"sinks": torch.zeros(8)}],
    ids=str,
)
def test_probe_passes(options: dict, dtype: torch.dtype):
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    probe("cuda", dtype, 8, 2, 64, 64, AttentionOptions(**moved))


def test_machine_is_known():
    machine = machine_of(torch.device("cuda"))
    assert machine.device_type == "cuda"
    assert machine.capability == torch.cuda.get_device_capability()
