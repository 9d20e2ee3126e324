"""A head back end that is wrong on the device of a run stops the run before it starts."""

from __future__ import annotations

import logging

import pytest
import torch

from dpofast.data.packing.collate import Layout
from dpofast.errors import ConfigError
from dpofast.model import head_check, quantised
from dpofast.model.checks import check_model
from dpofast.model.head_check import check_head_backend, head_traits
from dpofast_kernels.head import HeadTraits, WrongHeadError, backends, probe
from tests.families import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_earlier_probes():
    head_check.probed_head.cache_clear()
    yield
    head_check.probed_head.cache_clear()


def test_the_head_of_a_run_is_probed_once(caplog):
    model = tiny_model("gemma2")
    with caplog.at_level(logging.INFO, "dpofast.model.head_check"):
        for layout in ("shared", "padded"):
            check_model(model, Layout(layout), CPU, torch.bfloat16)
    assert caplog.messages == ["Head: torch (bfloat16); compared with its naive twin on cpu."]


def test_the_probe_has_the_options_of_the_run():
    model = tiny_model("gemma2")
    vocab_size, hidden_size = model.lm_head.weight.shape
    cap = model.config.final_logit_softcapping
    expected = HeadTraits(torch.bfloat16, hidden_size, vocab_size, False, cap, 1.0)
    assert cap
    assert head_traits(model, torch.bfloat16) == expected


def test_quantised_layers_do_not_change_the_dtype_of_the_head(monkeypatch):
    """Such as 8-bit layers, which count as bfloat16, of a model in float16."""
    monkeypatch.setattr(quantised, "quantised_layers", lambda lm: {"q_proj": lm.lm_head})
    monkeypatch.setattr(quantised, "_is_int8", lambda *given: len(given) == 1)
    model = tiny_model("llama").half()
    assert quantised.computing_dtype(model) == torch.bfloat16
    assert head_traits(model, None).dtype == torch.float16


@pytest.mark.parametrize(
    ("backend", "remedy"),
    [
        ("triton_fused", "set head_backend: triton to use the other one, and please"),
        ("triton", "set head_backend: torch to do without Triton, and please"),
        ("torch", "please report this"),
    ],
)
def test_a_wrong_head_stops_the_run(backend, remedy, monkeypatch):
    """The kernel is pretended: what it computes is off by a factor, in the log-probs alone."""
    run = probe._run

    def wrong(leaves, labels, options):
        found = run(leaves, labels, options)
        if options.backend != "naive":
            found["log-probs"] = 1.1 * found["log-probs"]
        return found

    attempt = probe._attempt
    monkeypatch.setattr(probe, "_run", wrong)
    monkeypatch.setattr(probe, "backend_for", lambda *_: backend)
    if backend != "torch":  # the interpreter is slow
        as_torch = lambda leaves, labels, options: attempt(  # noqa: E731
            leaves, labels, probe.replace(options, backend="torch")
        )
        monkeypatch.setattr(probe, "_attempt", as_torch)
    with pytest.raises(ConfigError, match=f"head: Head backend '{backend}' is wrong .*; {remedy}"):
        check_model(tiny_model("llama"), Layout("shared"), CPU, None)


def test_a_failing_head_stops_the_run(monkeypatch):
    def fails(*_):
        raise WrongHeadError("triton_fused", "Head backend 'triton_fused' doesn't run on cpu (x)")

    monkeypatch.setattr(head_check, "probe_head", fails)
    with pytest.raises(ConfigError, match=r"run on cpu \(x\); set head_backend: triton "):
        check_head_backend(tiny_model("llama"), CPU, None)


def test_a_back_end_of_another_device_stops_the_run(monkeypatch):
    monkeypatch.setattr(backends, "is_interpreted", lambda kernel: False)
    with pytest.raises(ConfigError, match=r"^head_backend: backend 'triton' was .* are on cpu"):
        check_head_backend(tiny_model("llama"), CPU, None, "triton")
