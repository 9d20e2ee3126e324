"""An import of bitsandbytes after dpofast neither asks for a kernel nor logs that there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What bitsandbytes.backends.cpu.ops does on a CPU with AVX512-BF16.
OPS = """
import logging
try:
    from kernels import get_kernel
    kernel = get_kernel("a kernel")
except Exception as error:
    kernel = None
    logging.getLogger(__name__).warning("Failed to load: %s", error)
"""
KERNELS = """
def get_kernel(name):
    return f"downloaded {name}"
"""


def printed(folder, first):
    for path, text in {
        "bitsandbytes/__init__.py": "",
        "bitsandbytes/backends/__init__.py": "",
        "bitsandbytes/backends/cpu/__init__.py": "",
        "bitsandbytes/backends/cpu/ops.py": OPS,
        "kernels/__init__.py": KERNELS,
    }.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)
    lines = [
        "import sys",
        f"sys.path.insert(0, {str(folder)!r})",
        first,
        "from bitsandbytes.backends.cpu import ops",
        "import kernels, logging",
        "print('kernel:', ops.kernel)",
        "print('own kernels:', kernels.get_kernel('x'))",
        "print('logs:', logging.getLogger(ops.__name__).isEnabledFor(logging.WARNING))",
        "print('finders:', [type(finder).__name__ for finder in sys.meta_path])",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return result.stdout + result.stderr


@pytest.mark.parametrize("first", ["import dpofast", "import kernels, dpofast.errors"])
def test_bitsandbytes_gets_no_kernel_and_everybody_else_does(tmp_path, first):
    text = printed(tmp_path, first)
    assert "kernel: None" in text
    assert "Failed to load" not in text
    assert "own kernels: downloaded x" in text
    assert "logs: True" in text
    assert "_WithoutKernels" not in text


def test_without_dpofast_it_gets_one(tmp_path):
    assert "kernel: downloaded a kernel" in printed(tmp_path, "import sys")


@pytest.mark.slow  # another import of PyTorch
def test_the_real_import_is_silent():
    pytest.importorskip("bitsandbytes", reason="needs the extra `bitsandbytes`")
    code = "import dpofast, bitsandbytes"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "Failed to load" not in result.stderr
