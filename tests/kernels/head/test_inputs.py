"""Misuse of the public ops raises an error that names the argument."""

from __future__ import annotations

import sys

import pytest
import torch

from dpofast_kernels import (
    HeadOptions,
    backend_for,
    linear_logps,
    linear_pair_loss,
    make_loss,
    sum_per_sequence,
)
from dpofast_kernels.head import backends, inputs
from tests.kernels.head.cases import make_inputs


def call(**changes):
    """linear_pair_loss with some arguments changed; 16 rows of 2 pairs, H 6, V 11."""
    given = make_inputs(torch.float32, hidden_size=6, vocab_size=11, lengths=(3, 5, 1, 7))
    arguments = {
        "hidden_states": given.hidden_states,
        "weight": given.weight,
        "labels": given.labels,
        "bounds": given.bounds,
        "ref_logps": given.ref_logps,
        "loss": make_loss("sigmoid"),
        **changes,
    }
    return linear_pair_loss(**arguments)


def labels_with(value):
    labels = torch.zeros(16, dtype=torch.int64)
    labels[5] = value
    return labels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_states": torch.zeros(2, 8, 6)},
            r"hidden_states is \[2, 8, 6\], expected \[N, H\]",
        ),
        ({"weight": torch.zeros(11, 7)}, r"weight is \[11, 7\], expected \[V, 6\]"),
        ({"weight": torch.zeros(11)}, r"weight is \[11\], expected \[V, 6\]"),
        ({"weight": torch.zeros(11, 6).bfloat16()}, "hidden_states is torch.float32 but weight"),
        ({"weight": torch.zeros(11, 6).long()}, "weight torch.int64, expected float64"),
        ({"weight": torch.zeros(11, 6, device="meta")}, "weight is on meta"),
        ({"labels": torch.zeros(16, device="meta").long()}, "labels is on meta"),
        ({"labels": torch.zeros(15).long()}, r"labels is \[15\] torch.int64, expected \[16\]"),
        ({"labels": torch.zeros(16)}, r"labels is \[16\] torch.float32"),
        ({"labels": labels_with(11)}, r"labels\[5\] is 11, expected 0 to 10"),
        ({"labels": labels_with(-100)}, r"labels\[5\] is -100, expected 0 to 10"),
        ({"bounds": torch.tensor([0, 3, 8, 9, 15])}, "from 0 to 15, expected 0 to 16"),
        ({"bounds": torch.tensor([1, 3, 8, 9, 16])}, "from 1 to 16, expected 0 to 16"),
        ({"bounds": torch.tensor([0, 8, 3, 9, 16])}, "bounds fall from 8 to 3 at sequence 1"),
        ({"bounds": torch.tensor([0, 3, 8, 16])}, "3 sequences, expected an even number"),
        ({"bounds": torch.tensor([0, 3, 3, 9, 16])}, r"sequence 1 \(rejected of pair 0\) has no"),
        ({"bounds": torch.tensor([0, 3, 8, 8, 16])}, r"sequence 2 \(chosen of pair 1\) has no"),
        ({"bounds": torch.tensor([0.0, 16.0])}, r"bounds is \[2\] torch.float32"),
        ({"bounds": torch.tensor([[0, 16]])}, r"bounds is \[1, 2\]"),
        ({"ref_logps": torch.zeros(3)}, r"ref_logps is \[3\] torch.float32, expected \[4\]"),
        ({"ref_logps": torch.zeros(4).long()}, r"ref_logps is \[4\] torch.int64"),
        ({"options": HeadOptions(bias=torch.zeros(6))}, r"bias is \[6\].*expected \[11\]"),
        ({"options": HeadOptions(bias=torch.zeros(11).double())}, "bias is .* expected .*float32"),
        (
            {"options": HeadOptions(weight_grad=torch.zeros(11, 6).bfloat16())},
            r"weight_grad is \[11, 6\] torch.bfloat16, expected \[11, 6\] torch.float32",
        ),
        (
            {"options": HeadOptions(weight_grad=torch.zeros(6, 11).t())},
            r"weight_grad has strides \(1, 11\), expected a contiguous",
        ),
        (
            {"options": HeadOptions(weight_grad=torch.zeros(11, 6), backend="naive")},
            "backend 'naive' can't add to weight_grad",
        ),
    ],
)
def test_misuse(changes, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_linear_logps_checks_too():
    with pytest.raises(ValueError, match=r"labels\[0\] is 4, expected 0 to 3"):
        linear_logps(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([4]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap is 0.0, expected a finite number above 0"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"logit_scale": -1.0}, "logit_scale is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        (
            {"backend": "cuda"},
            "Unknown backend 'cuda', expected one of auto, torch",
        ),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        HeadOptions(**options)


def test_backend_for():
    tensor = torch.zeros(1)
    assert backend_for(tensor) == "torch"
    for backend in ("torch", "naive", "triton"):
        assert backend_for(tensor, HeadOptions(backend=backend)) == backend


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "is_interpreted", lambda kernel: False)
    with pytest.raises(ValueError, match=r"the tensors are on cpu.*TRITON_INTERPRET=1"):
        call(options=HeadOptions(backend="triton"))


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="Triton isn't installed"):
        backend_for(torch.zeros(1), HeadOptions(backend="triton"))


class TestSumPerSequence:
    def test_sums_and_gradient(self):
        logps = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
        sums = sum_per_sequence(logps, torch.tensor([0, 1, 1, 4]))
        assert sums.dtype == torch.float64
        assert sums.tolist() == [1.0, 0.0, 14.0]
        sums.backward(torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64))
        assert logps.grad.tolist() == [2.0, 5.0, 5.0, 5.0]

    def test_is_exact_where_float32_is_not(self):
        logps = torch.full((100_000,), -0.1)
        total = sum_per_sequence(logps, torch.tensor([0, 100_000]))
        assert abs(total.item() - 100_000 * logps[0].item()) < 1e-6

    def test_no_sequences(self):
        logps = torch.zeros(0, requires_grad=True)
        sums = sum_per_sequence(logps, torch.tensor([0]))
        assert sums.shape == (0,)
        sums.sum().backward()
        assert logps.grad.shape == (0,)

    def test_bounds_must_cover_the_rows(self):
        with pytest.raises(ValueError, match="from 0 to 3, expected 0 to 4"):
            sum_per_sequence(torch.zeros(4), torch.tensor([0, 3]))
        with pytest.raises(ValueError, match=r"per_token_logps is \[2, 2\]"):
            sum_per_sequence(torch.zeros(2, 2), torch.tensor([0, 4]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 4).long(), r"labels is \[2, 4\] torch.int64, expected \[2, 5\]"),
        (torch.zeros(2, 5), r"labels is \[2, 5\] torch.float32, expected \[2, 5\] torch.int64"),
        (torch.tensor([[0] * 5, [-100, 0, 11, 0, 0]]), r"labels\[1, 2\] is 11, expected 0 to 10"),
        (torch.tensor([[0] * 5, [-100, 0, -1, 0, 0]]), r"labels\[1, 2\] is -1, expected 0 to 10"),
    ],
)
def test_misuse_of_padded_inputs(labels, message):
    with pytest.raises(ValueError, match=message):
        linear_logps(torch.zeros(2, 5, 6), torch.zeros(11, 6), labels)


def test_labels_on_a_device_are_checked_when_asked_for(monkeypatch):
    """The labels are on the CPU, but say that they are on a device."""

    class OnDevice(torch.Tensor):
        device = torch.device("cuda")

    labels = torch.tensor([0, 3, 11]).as_subclass(OnDevice)
    inputs.check_labels(labels, 11)
    monkeypatch.setenv("DPOFAST_CHECK_LABELS", "1")
    with pytest.raises(ValueError, match=r"labels\[2\] is 11, expected 0 to 10"):
        inputs.check_labels(labels, 11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "sigmoid"}, "loss is a str, expected one from make_loss"),
        ({"options": None}, "options is a NoneType, expected HeadOptions"),
        ({"bounds": [0, 3, 8, 9, 16]}, "bounds is a list, expected a tensor"),
        ({"ref_logps": None}, "ref_logps is a NoneType, expected a tensor"),
        ({"hidden_states": None}, "hidden_states is a NoneType, expected a tensor"),
    ],
)
def test_arguments_of_another_type(changes, message):
    with pytest.raises(TypeError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": None},
        {"logit_scale": True},
        {"workspace_bytes": 0},
        {"workspace_bytes": 1.5},
        {"workspace_bytes": True},
        {"workspace_bytes": "1GB"},
    ],
)
def test_options_of_another_kind(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is .*, expected"):
        HeadOptions(**options)


@pytest.mark.parametrize("name", ["bias", "weight_grad"])
def test_options_that_are_no_tensors(name):
    with pytest.raises(TypeError, match=f"{name} is a float, expected a tensor"):
        HeadOptions(**{name: 0.5})
