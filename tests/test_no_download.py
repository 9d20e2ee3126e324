"""An import of bitsandbytes after dpofast neither asks for a kernel nor logs that there is none."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("bitsandbytes", reason="needs the extra `bitsandbytes`")

# A package `kernels` that tells if it is asked.
KERNELS = """
def get_kernel(*args, **kwargs):
    print("ASKED FOR A KERNEL")
    raise RuntimeError("no kernel")
"""
IMPORTS = """
    import sys
    {first}
    import bitsandbytes.backends.cpu.ops as ops
    import kernels
    print("found again:", kernels.__file__)
    print("finders:", [type(finder).__name__ for finder in sys.meta_path])
"""


def printed(folder, first):
    (folder / "kernels").mkdir(exist_ok=True)
    (folder / "kernels" / "__init__.py").write_text(KERNELS)
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{textwrap.dedent(IMPORTS)}"
    command = [sys.executable, "-c", code.format(first=first)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return result.stdout + result.stderr


def test_bitsandbytes_asks_for_no_kernel(tmp_path):
    text = printed(tmp_path, "import dpofast, dpofast")
    assert "ASKED" not in text
    assert "Failed to load" not in text
    assert f"found again: {tmp_path}" in text
    assert "_WithoutKernels" not in text


@pytest.mark.slow  # a second import of PyTorch
def test_without_dpofast_it_does_where_the_cpu_has_avx512_bf16(tmp_path):
    from bitsandbytes.functional import has_avx512bf16

    assert ("ASKED" in printed(tmp_path, "pass")) == bool(has_avx512bf16())
