"""Every launch configuration compiles for its target without a GPU, fits, and does not spill."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpofast_kernels.head.launch import launch_table
from dpofast_kernels.preference import LOSSES, UNPAIRED_LOSSES
from tests.kernels.compile_kernels import (
    GENERAL,
    KERNELS,
    LAUNCHED_AS,
    LAUNCHED_EVERYWHERE,
    jobs,
)

ROOT = Path(__file__).resolve().parents[2]
# Bytes of shared memory that a block can have.
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
# sm_86 has as little shared memory as sm_120.
TARGETS = [
    pytest.param(target, marks=pytest.mark.torture) if target == "sm_120" else target
    for target in SHARED_MEMORY
]
WITH_DOT = {"score_tiles", "score_tiles_wide"}
WITH_STATISTICS = {"score_rows", "score_tiles_wide", "finish_rows"}


@pytest.fixture(scope="module")
def compiled(lines_of_compiler) -> Callable[..., list[dict[str, Any]]]:
    """A function that compiles the kernels for one target, once, and reports on each.

    It compiles one of the sets of compile_kernels: "quick", "plain" or "statistics".
    """

    @functools.cache
    def compile_for(target: str, variants: str) -> list[dict[str, Any]]:
        return lines_of_compiler("tests.kernels.compile_kernels", variants, target)

    return compile_for


@pytest.mark.aot
@pytest.mark.timeout(960)
def test_one_variant_of_each_kernel_fits_without_spills(compiled):
    """For one target: AMD's compiler takes a third of NVIDIA's time."""
    check(compiled, "gfx942", "quick")


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.timeout(960)
@pytest.mark.parametrize("target", TARGETS)
def test_configurations_fit_without_spills(compiled, target):
    check(compiled, target, "plain")


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.timeout(960)
@pytest.mark.parametrize("target", TARGETS)
def test_statistics_fit_without_spills(compiled, target):
    check(compiled, target, "statistics")


def check(compiled: Callable[..., list[dict[str, Any]]], target: str, variants: str) -> None:
    """Check that each kernel fits, doesn't spill, and uses matrix units if it should."""
    entry, other = launch_table()[target], launch_table()["sm_80"]
    found = list(compiled(target, variants))
    if target == "sm_86":
        common = {kernel for kernel in entry if entry[kernel] == other[kernel]}
        common |= {kernel for kernel, launched in LAUNCHED_AS.items() if launched in common}
        common |= set(LAUNCHED_EVERYWHERE)
        found += [line for line in compiled("sm_80", variants) if line["kernel"] in common]
    for line in found:
        print(*line.values())
    everything = {*entry, *LAUNCHED_AS, *LAUNCHED_EVERYWHERE} - {"measured"}
    expected = WITH_STATISTICS if variants == "statistics" else everything
    assert {line["kernel"] for line in found} == expected
    for line in found:
        assert line["shared"] <= SHARED_MEMORY[target], line
        assert line["spills"] == 0, line
        assert (line["matrix"] > 0) == (line["kernel"] in WITH_DOT), line


def test_nothing_is_left_out():
    named = {
        path.name: re.findall(r"^def (\w+)_kernel\(", path.read_text(), re.MULTILINE)
        for path in (ROOT / "kernels" / "dpofast_kernels").rglob("*_triton.py")
    }
    kernels = set(KERNELS)
    assert kernels == {name for names in named.values() for name in names}
    assert set(SHARED_MEMORY) == set(launch_table()) - {"cpu"}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        names = {kernel for kernel, architecture, _ in jobs() if architecture == target}
        assert names == kernels | {"score_tiles_wide"}
    assert {variant for kernel, _, variant in jobs() if kernel == "pair_loss"} == {
        *LOSSES,
        "custom",
        *(f"{loss}:general" for loss in GENERAL),
    }
    assert {variant for kernel, _, variant in jobs() if kernel == "sequence_loss"} == {
        *UNPAIRED_LOSSES,
        *(f"{loss}:weighted" for loss in UNPAIRED_LOSSES),
    }


def test_an_entry_names_the_device_it_was_measured_on():
    for entry in launch_table().values():
        measured = entry["measured"] or {}
        assert measured.keys() <= entry.keys() - {"measured"}
        assert all(each["device"] for each in measured.values())
