"""The kernels' benchmarks run with few packages, like those of a rented GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import pytest

from benchmarks import REPOSITORY

# Installed on a machine with a GPU: PyTorch, what it needs, and rich for the tables.
NEEDED = {"torch", "triton", "numpy", "rich"}
IMPORTED_AS = {
    "pyyaml": "yaml",
    "liger-kernel": "liger_kernel",
    "cut-cross-entropy": "cut_cross_entropy",
}


def other_packages():
    """Import names of the project's dependencies and extras that are not NEEDED."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["peft"], *extras["bench"]]
    names = {re.match(r"[\w-]+", each)[0] for each in wanted} - NEEDED
    # Installed with these packages, and imported by the repository.
    return {IMPORTED_AS.get(name, name) for name in names} | {"huggingface_hub", "tokenizers"}


PROGRAM = """
import sys
sys.modules.update(dict.fromkeys({names}, None))
import torch
from {module} import main
sys.argv = ["{module}", "--dry-run", {arguments}]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "shown"),
    [
        ("benchmarks.head", ("--no-memory", "--contenders", "trl"), "absent: ModuleNotFoundError"),
        ("benchmarks.tune", ("--kernels", "pair_loss", "--limit", "1"), " ms"),
    ],
)
def test_torch_triton_and_rich_are_enough(module, arguments, shown):
    names = other_packages()
    assert {"transformers", "datasets", "pydantic", "trl", "liger_kernel"} <= names
    text = ", ".join(map(repr, arguments))
    program = PROGRAM.format(names=sorted(names), module=module, arguments=text)
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert shown in ended.stdout
