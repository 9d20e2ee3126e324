"""Rules of the repository that no other test checks."""

from __future__ import annotations

import ast
import itertools
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CPU_TARGETS = ("test", "test-ranks", "test-slow")
SOURCES = sorted([*ROOT.glob("dpofast/**/*.py"), *ROOT.glob("kernels/dpofast_kernels/**/*.py")])


def test_kernels_never_becomes_a_package() -> None:
    """Hugging Face publishes a package `kernels`, which a regular package here would shadow."""
    assert (ROOT / "kernels" / "dpofast_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_only_the_kernels_have_formulas_of_losses() -> None:
    """A log-sigmoid anywhere else would be a second copy of a loss's formula."""
    texts = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("dpofast/**/*.py")}
    assert not [str(path) for path, text in texts.items() if "logsigmoid" in text]


def test_files_and_functions_stay_small() -> None:
    long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        if len(text.splitlines()) > 400:
            long.append(f"{name} has more than 400 lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                limit = 150 if node.name.endswith("_kernel") else 60
                assert node.end_lineno is not None
                lines = node.end_lineno - node.body[0].lineno + 1  # without the signature
                if lines > limit:
                    long.append(f"{name}: {node.name} has {lines} lines, at most {limit}")
    assert not long


def test_prose_has_none_of_the_worst_phrases() -> None:
    """Fragments that begin with "Of", "stands" for "is", and "lacks" without an object."""
    phrases = re.compile(r'(^|"""|# )Of |\bstands? (in|for|beside|once|twice)\b|\blacks\b *[.;,]')
    folders = ("benchmarks", "docs", "dpofast", "kernels", "tests", ".ci")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    files = [path for path in files if path.suffix in (".py", ".md") or path.name == "run"]
    files += [ROOT / "Makefile", *ROOT.glob("*.py"), *ROOT.glob("*.md")]
    assert not [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if phrases.search(line)
    ]


def test_both_packages_carry_their_types() -> None:
    for package in ("dpofast", "kernels/dpofast_kernels"):
        assert (ROOT / package / "py.typed").is_file()


def test_constraints_are_exact_and_cover_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    assert lines == sorted(lines, key=str.lower)
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    extras = project["optional-dependencies"]
    # the extra `hybrid` is for GPUs, and no machine with these versions installs it
    groups = [project["dependencies"], *(extras[name] for name in extras if name != "hybrid")]
    declared = itertools.chain.from_iterable(groups)
    names = {re.match(r"[A-Za-z0-9._-]+", spec)[0] for spec in declared}  # type: ignore[index]
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in names} <= pinned
    assert "torch==2.13.0" in lines


def pytest_lines(target: str) -> list[str]:
    """The lines of a Makefile's target that run pytest."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    variable, value = re.search(r"^(\w+) := (.*pytest.*)$", makefile, re.MULTILINE).groups()  # type: ignore[union-attr]
    rule = makefile.split(f"\n{target}: ")[1].split("\n\n")[0].replace(f"$({variable})", value)
    return [line for line in rule.splitlines() if "pytest" in line]


def test_every_test_is_run_by_exactly_one_target() -> None:
    """All tests but those marked `gpu` or `torture`, which have targets of their own."""
    markers = ("slow", "distributed", "torture", "gpu")
    selections = []
    for target in CPU_TARGETS:
        (line,) = pytest_lines(target)
        selections.append(re.search(r"-m '(.*)'", line)[1])  # type: ignore[index]
    for carried in itertools.product((False, True), repeat=len(markers)):
        marked = dict(zip(markers, carried, strict=True))
        selected = [bool(eval(selection, {}, marked)) for selection in selections]
        assert sum(selected) == (not marked["torture"] and not marked["gpu"]), marked


def test_ci_runs_every_target_that_needs_no_gpu() -> None:
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {f"make {target}" for target in CPU_TARGETS} <= set(commands)


def test_tests_that_launch_ranks_are_marked() -> None:
    """Unmarked, they would run with `make test`, which has no time for them."""
    files = [path for path in ROOT.glob("tests/**/test_*.py") if path != Path(__file__)]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    assert not [
        str(path.relative_to(ROOT))
        for path, text in texts.items()
        if "tests.distributed.launch" in text and "pytest.mark.distributed" not in text
    ]


def test_tests_without_a_gpu_do_not_see_one() -> None:
    """If they did, Triton would compile its kernels, and those would refuse the CPU tensors."""
    for target in CPU_TARGETS:
        assert all(
            " CUDA_VISIBLE_DEVICES= $(BIN)" in f" {line.strip()}" for line in pytest_lines(target)
        )
