"""The head's start-up check: what is right passes, and what is wrong is found."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpofast_kernels import (
    Answers,
    HeadOptions,
    linear_logps,
    linear_pair_loss,
    linear_scores,
    linear_sequence_loss,
    linear_statistics,
    make_loss,
    make_unpaired_loss,
)
from dpofast_kernels.head import (
    HeadTraits,
    WrongHeadError,
    backends,
    cast_triton,
    chunked,
    probe,
    probe_head,
    rescale_triton,
)
from dpofast_kernels.head.cast import scale_and_cast
from dpofast_kernels.head.rescale import rescale
from dpofast_kernels.head.tiled import TorchRows

PLAIN = HeadTraits(torch.float32, hidden_size=24, vocab_size=1007)
FULL = replace(PLAIN, has_bias=True, softcap=30.0, logit_scale=0.0625)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("traits", [PLAIN, FULL], ids=["plain", "full"])
def test_the_back_end_of_a_cpu_passes(traits, dtype):
    assert probe_head("cpu", replace(traits, dtype=dtype)) == "torch"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "triton_fused"])
@pytest.mark.parametrize("traits", [PLAIN, FULL], ids=["plain", "full"])
def test_the_other_back_ends_pass(traits, backend, monkeypatch):
    monkeypatch.setattr(probe, "backend_for", lambda *_: backend)
    monkeypatch.setattr(probe, "_ODD", 131)  # the interpreter is slow
    monkeypatch.setattr(probe, "_EVEN", 128)
    assert probe_head("cpu", replace(traits, dtype=torch.bfloat16)) == backend


def wrong_in(change):
    """TorchRows with something wrong in what it scores or differentiates."""

    class WrongRows(TorchRows):
        def score(self, hidden_states, labels, workspace, keep):
            return change("score", super().score(hidden_states, labels, workspace, keep))

        def differentiate(self, scored, labels, coefficients):
            made = super().differentiate(scored, labels, coefficients)
            return change("differentiate", made)

    return lambda backend, *arguments: WrongRows(*arguments)


def shifted_logps(step, found):
    if step == "score":
        return replace(found, per_token_logps=found.per_token_logps - 0.1)
    return found


def wrong_logsumexps(step, found):
    if step == "score" and found.logsumexps is not None:
        return replace(found, logsumexps=found.logsumexps * 1.1)
    return found


def last_column_missing(step, found):
    if step == "differentiate":
        found.d_logits[:, -200:] = 0.0
    return found


def not_a_number(step, found):
    if step == "differentiate":
        found.d_logits[0, 0] = float("nan")
    return found


def failing(step, found):
    raise ValueError("out of resource: shared memory\nand more")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted_logps, "the error of its log-probs in torch.float32 is 1"),
        (wrong_logsumexps, "the error of its log-sum-exps in torch.float32 is 1.0e-01"),
        (last_column_missing, "its gradient of"),
        (not_a_number, "its gradient of hidden_states in torch.float32 is nan"),
        (failing, r"doesn't run on cpu \(ValueError: out of resource: shared memory\)$"),
    ],
)
def test_a_wrong_back_end_is_found(change, message, monkeypatch):
    monkeypatch.setattr(chunked, "row_ops", wrong_in(change))
    with pytest.raises(WrongHeadError, match=rf"Head backend 'torch' .*{message}") as caught:
        probe_head("cpu", PLAIN)
    assert caught.value.backend == "torch"


def without_memory(step, found):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_lack_of_memory_is_no_fault_of_the_back_end(monkeypatch):
    monkeypatch.setattr(chunked, "row_ops", wrong_in(without_memory))
    with pytest.raises(torch.OutOfMemoryError):
        probe_head("cpu", PLAIN)


def test_a_wrong_sum_over_chunks_is_found(monkeypatch):
    """Such as of a product that overwrites where it should add."""
    monkeypatch.setattr(chunked, "add_weight_grad", chunked.weight_grad_into)
    with pytest.raises(WrongHeadError, match="gradient of weight"):
        probe_head("cpu", PLAIN)


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes weights on a pretended GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    return lambda dtype: torch.zeros(6, 4, dtype=dtype).as_subclass(OnGpu)


def test_the_default_on_a_gpu(gpu, monkeypatch):
    def chosen(tensor, *args):
        return backends.backend_for(tensor, *args)

    assert chosen(gpu(torch.bfloat16)) == "triton_fused"
    assert chosen(gpu(torch.float16)) == chosen(gpu(torch.float32)) == "triton"
    options = backends.DEFAULT_OPTIONS
    assert chosen(gpu(torch.float32), options, torch.bfloat16) == "triton_fused"  # autocast
    assert chosen(gpu(torch.bfloat16).t()) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chosen(gpu(torch.bfloat16)) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert chosen(gpu(torch.bfloat16)) == "triton"


@pytest.mark.parametrize("name", ["torch", "triton", "triton_fused"])
def test_an_option_chooses_another_back_end_on_a_gpu(name, gpu):
    options = replace(backends.DEFAULT_OPTIONS, backend=name)
    assert backends.backend_for(gpu(torch.bfloat16), options) == name


def test_triton_fused_is_refused_for_what_compiled_kernels_cannot_multiply(gpu, monkeypatch):
    options = replace(backends.DEFAULT_OPTIONS, backend="triton_fused")
    monkeypatch.setattr(backends, "is_interpreted", lambda kernel: False)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match=rf"computes in {dtype}, .* choose backend 'triton'"):
            backends.backend_for(gpu(dtype), options)
    assert backends.backend_for(gpu(torch.float32), options, torch.bfloat16) == "triton_fused"


def test_the_probe_compares_the_back_end_that_the_traits_name(monkeypatch):
    asked, run = set(), probe._run

    def noted(leaves, labels, options):
        asked.add(options.backend)
        return run(leaves, labels, replace(options, backend="naive"))  # the interpreter is slow

    monkeypatch.setattr(probe, "_run", noted)
    assert probe_head("cpu", replace(PLAIN, backend="triton")) == "triton"
    assert asked == {"naive", "triton"}


def test_the_torch_back_end_of_a_gpu_scales_gradients_without_triton(gpu, monkeypatch):
    launched = []
    monkeypatch.setattr(cast_triton, "scale_cast_fwd", lambda *_: launched.append("cast"))
    monkeypatch.setattr(rescale_triton, "rescale_fwd", lambda *_: launched.append("rescale"))
    factor = torch.tensor(2.0)
    narrow, wide = gpu(torch.bfloat16), gpu(torch.float32)
    for backend, expected in (("triton", ["cast", "rescale"]), ("torch", [])):
        scale_and_cast(wide + 1.0, factor, narrow, backend)
        rescale(narrow, factor, backend)
        assert launched == expected
        launched.clear()
    assert (narrow == 4.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_op_on_a_gpu_reaches_triton_if_the_back_end_is_torch(dtype, gpu, monkeypatch):
    """Not even in its backward, with chunks, a pair that is longer than one, and a buffer."""
    for file in Path(backends.__file__).parent.glob("*_triton.py"):
        monkeypatch.setitem(sys.modules, f"dpofast_kernels.head.{file.stem}", None)
    weight = gpu(dtype).requires_grad_()  # [6, 4]
    hidden_states = torch.ones(40, 4, dtype=dtype).as_subclass(OnGpu).requires_grad_()
    labels, bounds = torch.arange(40) % 6, torch.tensor([0, 18, 20, 30, 40])
    refs = torch.zeros(4).double()
    options = HeadOptions(backend="torch", upstream=0.5)
    for chosen in (options, replace(options, workspace_bytes=1)):
        for buffer in (None, torch.zeros_like(weight, dtype=torch.float32)):
            given = (hidden_states, weight, labels)
            loss = linear_pair_loss(
                *(*given, bounds, refs, make_loss("sigmoid", beta=0.1)),
                replace(chosen, weight_grad=buffer),
            ).loss
            (2.0 * loss).backward()
            linear_logps(*given, replace(chosen, weight_grad=buffer)).sum().backward()
        answers = Answers(bounds, refs, torch.tensor([True, False] * 2), torch.tensor(0.3))
        kto = make_unpaired_loss("kto", beta=0.1)
        (2.0 * linear_sequence_loss(*given, answers, kto, chosen).loss).backward()
        linear_scores(*given, chosen)
        linear_statistics(*given, ("entropy", "is_top"), chosen)
    with pytest.raises(ImportError):  # a back end that does reach it
        linear_scores(*given)
