"""Settings that must stand before Triton and DeepSpeed are imported, and what is made but once."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU Triton's kernels run interpreted, on CPU tensors. Tests that compile (marker
    # `aot`) do so in a subprocess: one process can't do both.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def plain_history() -> Any:
    """[20, 2]: loss and gradient norm of textbook DPO on real pairs; minutes of work."""
    from tests.real_pairs import plain_history

    return plain_history()
