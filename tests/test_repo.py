"""Rules of the repository that no other test would notice being broken."""

from __future__ import annotations

import ast
import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("dpofast/**/*.py"), *ROOT.glob("kernels/dpofast_kernels/**/*.py")])

# A room may import itself, what stands to its right, and nothing else of dpofast. Files that
# stand directly in dpofast/ are the trainer and its parts.
_BASE = {"errors"}
_TRAINER = {path.stem for path in ROOT.glob("dpofast/*.py")} - {"__init__", "__main__"}
ALLOWED = {
    "cli": {"cli", "demo", "data", "reference", "zero"} | _TRAINER,
    "demo": {"demo", "data"} | _TRAINER,
    "data": {"data"} | _BASE,
    "reference": {"reference"} | _BASE,
    "zero": {"zero"} | _BASE,
}
# Inside `reference` only these look at data or model.
REFERENCE_READERS = {"builder.py"}


def imported(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            assert node.module is not None
            yield node.module
            if node.module == "dpofast":
                yield from (f"dpofast.{alias.name}" for alias in node.names)


def rooms(path: Path) -> set[str]:
    """Rooms of dpofast that a file imports; names of dpofast/__init__.py count as the trainer."""
    names = {name.split(".")[1] for name in imported(path) if name.startswith("dpofast.")}
    return {"trainer" if name.startswith("DPO") else name for name in names} - {"__version__"}


def test_kernels_never_becomes_a_package() -> None:
    """Hugging Face publishes a package `kernels`, which a regular package here would shadow."""
    assert (ROOT / "kernels" / "dpofast_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_rooms_import_one_way(room: str) -> None:
    files = sorted((ROOT / "dpofast" / room).rglob("*.py"))
    assert files
    for path in files:
        allowed = ALLOWED[room]
        if room == "reference" and path.name in REFERENCE_READERS:
            allowed = allowed | {"data", "model"}
        assert rooms(path) <= allowed, path


def test_trainer_does_not_import_the_command_line() -> None:
    for path in ROOT.glob("dpofast/*.py"):
        if path.name != "__main__.py":
            assert not {"cli", "demo"} & rooms(path), path


def test_kernels_import_nothing_of_dpofast() -> None:
    for path in ROOT.glob("kernels/dpofast_kernels/**/*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] == "dpofast"], path


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
