"""A report that fails is one warning, and the run that it reports goes on."""

from __future__ import annotations

import pytest
from transformers import PrinterCallback, TrainerCallback

from dpofast.monitor.guard import ReportGuard, guard_reporters

LOGGER = "dpofast.monitor.guard"


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def test_each_report_warns_once_with_its_reason(caplog):
    guard, done = ReportGuard(), []
    for number in range(3):
        with guard("the plot"):
            raise OSError(28, "No space\nleft")
        with guard("the summary"):
            raise KeyError("x")
        done.append(number)
    assert done == [0, 1, 2]
    assert warnings_in(caplog) == [
        "the plot failed (OSError: [Errno 28] No space left); the run goes on without.",
        "the summary failed (KeyError: 'x'); the run goes on without.",
    ]


def test_what_succeeds_is_silent_and_an_interrupt_is_passed_on(caplog):
    with ReportGuard()("the plot"):
        pass
    with pytest.raises(KeyboardInterrupt), ReportGuard()("the plot"):
        raise KeyboardInterrupt
    assert warnings_in(caplog) == []


class Own(TrainerCallback):
    """A callback of the user, which may mean to stop the run."""

    def on_log(self, *args, **kwargs):
        raise OSError("meant")


def test_reporters_are_guarded_once_set_up_and_own_callbacks_never(caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk")

    monkeypatch.setattr(PrinterCallback, "on_log", fail)
    monkeypatch.setattr(PrinterCallback, "on_train_begin", fail)
    printer, own = PrinterCallback(), Own()
    for _ in range(2):
        guard_reporters([printer, own])
    assert printer.on_log(None, None, None) is None
    assert printer.on_log(None, None, None) is None
    with pytest.raises(OSError, match="disk"):
        printer.on_train_begin(None, None, None)
    with pytest.raises(OSError, match="meant"):
        own.on_log(None, None, None)
    failed = "PrinterCallback failed (OSError: disk); the run goes on without."
    assert warnings_in(caplog) == [failed]
