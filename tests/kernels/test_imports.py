"""The kernels import only PyTorch, and Triton only in the files that need it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "kernels" / "dpofast_kernels").rglob("*.py"))


def imported_names(tree: ast.AST) -> set[str]:
    """Top-level names of everything that is imported anywhere in a file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(str(node.module).split(".")[0])
    return names


def test_kernels_is_no_package():
    """A regular package named `kernels` would shadow the one that transformers imports."""
    assert SOURCES
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_imports():
    for path in SOURCES:
        allowed = {*sys.stdlib_module_names, "torch", "dpofast_kernels"}
        if path.stem.endswith("_triton") or path.stem == "launch":
            allowed.add("triton")
        assert imported_names(ast.parse(path.read_text())) <= allowed, path


def test_runs_where_triton_is_not_installed():
    program = """
import sys
sys.modules["triton"] = None
import torch
from dpofast_kernels import HeadOptions, backend_for, linear_logps
logps = linear_logps(torch.ones(3, 2), torch.ones(5, 2), torch.tensor([0, 1, 4]))
assert abs(logps.exp().sum().item() - 0.6) < 1e-6
assert backend_for(logps) == "torch"
try:
    backend_for(logps, HeadOptions(backend="triton"))
except ValueError as error:
    assert "isn't installed" in str(error)
else:
    raise AssertionError("no error")
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
