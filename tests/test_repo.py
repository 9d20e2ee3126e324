"""Rules of the repository that no other test would notice being broken."""

from __future__ import annotations

import ast
import itertools
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("dpofast/**/*.py"), *ROOT.glob("kernels/dpofast_kernels/**/*.py")])

def test_kernels_never_becomes_a_package() -> None:
    """Hugging Face publishes a package `kernels`, which a regular package here would shadow."""
    assert (ROOT / "kernels" / "dpofast_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_losses_stand_in_the_kernels_alone() -> None:
    """The formula of a loss has one home; log-sigmoid elsewhere would be a second one."""
    for path in ROOT.glob("dpofast/**/*.py"):
        assert "logsigmoid" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            is_kernel = node.name.endswith("_kernel")
            assert node.end_lineno is not None
            lines = node.end_lineno - node.body[0].lineno + 1  # the signature apart
            assert lines <= (150 if is_kernel else 60), node.name


def test_both_packages_carry_their_types() -> None:
    for package in ("dpofast", "kernels/dpofast_kernels"):
        assert (ROOT / package / "py.typed").is_file()


def test_constraints_are_exact_and_cover_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    assert lines == sorted(lines, key=str.lower)
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = itertools.chain.from_iterable(groups)
    names = {re.match(r"[A-Za-z0-9._-]+", spec)[0] for spec in declared}  # type: ignore[index]
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in names} <= pinned
    assert "torch==2.13.0" in lines


def test_tests_without_a_gpu_do_not_see_one() -> None:
    """Where one is seen, Triton's kernels are compiled, and refuse the CPU tensors of the tests."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = [line for line in makefile.splitlines() if "pytest" in line and "not gpu" in line]
    assert len(lines) == 2
    assert all(line.startswith("\tCUDA_VISIBLE_DEVICES= ") for line in lines)
