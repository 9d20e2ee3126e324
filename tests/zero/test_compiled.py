"""DeepSpeed's compiled operations: what isn't needed is left out, abandoned locks are named."""

from __future__ import annotations

import logging
import subprocess
import sys

from dpofast.zero.compiled import SHARED_MEMORY, settle_operations

HOLD = "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held'); input()"


def test_deepspeed_takes_shared_memory_for_unavailable(monkeypatch):
    from deepspeed import ops
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setitem(ops.__compatible_ops__, SHARED_MEMORY, True)
    settle_operations()
    assert ops.__compatible_ops__[SHARED_MEMORY] is (get_accelerator().device_name() != "cpu")


def test_only_a_lock_that_nobody_holds_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        settle_operations()
        assert caplog.records == []
        holder.kill()
    with caplog.at_level(logging.WARNING, logger="dpofast.zero.compiled"):
        settle_operations()
    (warning,) = caplog.messages
    assert str(lock) in warning
    assert "Delete it" in warning
