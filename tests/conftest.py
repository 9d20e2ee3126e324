"""Settings that must stand before Triton and DeepSpeed are imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Without a GPU Triton's kernels run interpreted, on CPU tensors. Tests that compile (marker
    # `aot`) do so in a subprocess: one process can't do both.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
