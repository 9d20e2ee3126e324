"""cuDNN's attention is switched off where its gradients are NaN, and the result says so."""

from __future__ import annotations

import pytest
from torch.nn.attention import SDPBackend

from benchmarks import cudnn


@pytest.fixture
def switched(monkeypatch):
    calls = []
    monkeypatch.setattr("torch.backends.cuda.enable_cudnn_sdp", calls.append)
    return calls


@pytest.mark.parametrize(
    ("name", "device", "is_wrong", "is_off"),
    [
        ("sdpa", "cuda", True, True),
        ("sdpa", "cuda", False, False),
        ("sdpa", "cpu", True, False),
        ("flash_attention_2", "cuda", True, False),
    ],
)
def test_only_wrong_gradients_switch_it_off(name, device, is_wrong, is_off, switched, monkeypatch):
    monkeypatch.setattr(cudnn, "has_nan_gradients", lambda _: is_wrong)
    said = cudnn.right_attention(name, device)
    assert switched == ([False] if is_off else [])
    assert (said == name) == (not is_off)
    assert ("NaN gradients (pytorch#196678)" in said) == is_off


def test_right_gradients_are_told_from_nan(monkeypatch):
    assert not cudnn.has_nan_gradients("cpu", SDPBackend.MATH)
    monkeypatch.setattr(cudnn, "LOW_SCORE", float("inf"))
    assert cudnn.has_nan_gradients("cpu", SDPBackend.MATH)


def test_a_missing_kernel_is_not_wrong():
    assert not cudnn.has_nan_gradients("cpu", SDPBackend.CUDNN_ATTENTION)
