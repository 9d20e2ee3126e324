"""Every Triton kernel compiles for every target, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpofast_kernels.head import rows_triton
from dpofast_kernels.preference import LOSSES

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


@pytest.mark.aot
def test_kernels_compile_for_every_target(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "kernels" / "compile_kernels.py"],
        env={
            **environment,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    compiled = [line.split() for line in result.stdout.splitlines()]
    names = {name.split(":")[0] for name, _, _ in compiled}
    jitted = {
        name.removesuffix("_kernel") for name in vars(rows_triton) if name.endswith("_kernel")
    }
    assert names == {*jitted, "pair_loss"}
    assert {name.split(":")[1] for name, _, _ in compiled if name.startswith("pair_loss")} == set(
        LOSSES
    )
    for name in {name for name, _, _ in compiled}:
        assert {target for other, target, _ in compiled if other == name} == set(SHARED_MEMORY)
    for name, target, shared in compiled:
        assert int(shared) <= SHARED_MEMORY[target], (name, target)
