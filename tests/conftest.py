"""Settings that Triton and DeepSpeed read when they are imported, and fixtures for all tests."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels run interpreted, on CPU tensors. Tests that compile (marker
    # `aot`) do so in a subprocess: one process can't do both.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
with torch.device("meta"):
    # PyTorch lists the functions that make tensors when it first needs them. A list that is made
    # while something is compiled is wrong, and is kept.
    torch.empty(0)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs with Ctrl-C ignored, which the tests of it would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """Hide the objects of imported modules from the garbage collector.

    accelerate runs the collector in every training run. It would look at half a million objects of
    the imported libraries each time, which takes longer than the steps of a tiny model.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def real_plots() -> None:
    """Let training draw its plot, for a test that needs it."""


@pytest.fixture(autouse=True)
def _no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off the plot of a run: it takes longer than the training. See `real_plots`."""
    reports = "dpofast.train.reports.reports_run"
    if reports in sys.modules and "real_plots" not in request.fixturenames:
        monkeypatch.setattr(f"{reports}.plot_run", lambda *_: None)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Give the next test the number of threads that this one began with.

    The commands of the benchmarks set it. With two threads in each of two workers, every later
    test would take up to three times longer.
    """
    num_threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def plain_history() -> Any:
    """[20, 2]: loss and gradient norm of textbook DPO on real pairs; takes minutes."""
    from tests.real_pairs import plain_history

    return plain_history()
