"""What all tests on ranks need once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BUILD = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"


@pytest.fixture(scope="session", autouse=True)
def _operation_of_deepspeed() -> None:
    """Compile DeepSpeed's Adam for optimizers on the CPU.

    The first run on a machine compiles it, which takes minutes. It must be there before a test
    limits the time of its ranks, or kills them: a killed compiler leaves a lock, for which all
    later runs would wait.
    """
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    # Without a compiler, only the tests that use the operation fail, and say so.
    subprocess.run([sys.executable, "-c", BUILD], env=environment, capture_output=True, timeout=600)
