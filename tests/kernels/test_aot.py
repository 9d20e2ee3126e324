"""Every launch configuration compiles for its target without a GPU, fits, and does not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpofast_kernels.head import fused_triton, pairs_triton, rows_triton
from dpofast_kernels.head.launch import launch_table
from dpofast_kernels.preference import LOSSES

ROOT = Path(__file__).resolve().parents[2]
# Bytes that a block may have.
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
WITH_DOT = {"score_tiles", "score_tiles_wide"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "kernels" / "compile_kernels.py"],
        env={
            **environment,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.aot
@pytest.mark.timeout(960)
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_configurations_fit_without_spills(compiled, target):
    entry, other = launch_table()[target], launch_table()["sm_80"]
    found = [line for line in compiled if line["target"] == target]
    if target == "sm_86":
        common = {kernel for kernel in entry if entry[kernel] == other[kernel]}
        found += [
            line for line in compiled if line["target"] == "sm_80" and line["kernel"] in common
        ]
    for line in found:
        print(*line.values())
    assert {line["kernel"] for line in found} == entry.keys() - {"measured"}
    for line in found:
        assert line["shared"] <= SHARED_MEMORY[target], line
        assert line["spills"] == 0, line
        assert (line["matrix"] > 0) == (line["kernel"] in WITH_DOT), line


@pytest.mark.aot
@pytest.mark.timeout(960)
def test_nothing_is_left_out(compiled):
    kernels = {
        name.removesuffix("_kernel")
        for module in (fused_triton, pairs_triton, rows_triton)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert set(SHARED_MEMORY) == set(launch_table()) - {"cpu"}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        names = {line["kernel"] for line in compiled if line["target"] == target}
        assert names == kernels | {"score_tiles_wide"}
        losses = {line["variant"] for line in compiled if line["kernel"] == "pair_loss"}
        assert losses == set(LOSSES)


def test_what_was_never_measured_says_so():
    """An entry names the devices that its kernels were measured on, where they were."""
    for entry in launch_table().values():
        measured = entry["measured"] or {}
        assert measured.keys() <= entry.keys() - {"measured"}
        assert all(each["device"] for each in measured.values())
