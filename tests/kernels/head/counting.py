"""Counts what a call of the head would launch and move on a GPU, by running it on the meta device.

Every operation of PyTorch that isn't a view is a launch, which reads and writes each of its tensors
once. Triton kernels don't run: each counts as a launch, and what it reads and writes is written
down here. The bytes are those of matrices with a dimension of V or H. Vectors and the sums of tiles
are left out, and so is what a library adds to a product, such as a reduction.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpofast_kernels import HeadOptions, linear_pair_loss, make_loss
from dpofast_kernels.head import (
    autograd,
    dispatch,
    dtypes,
    finish_triton,
    fused_triton,
    matmul,
    pairs_triton,
)
from dpofast_kernels.head.launch import launch_table

# They launch nothing; new memory is filled in these tests alone.
FREE = ("aten::empty", "aten::detach", "aten::new_empty", "aten::fill_")
WRITES_ONLY = ("aten::copy_", "aten::zero_")  # they don't read what they change


class Counting(TorchDispatchMode):
    """Launches and bytes of all operations inside the `with` block, by name.

    Args:
        widths: V and H.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self._widths = {*widths}
        self.launches: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()

    def add(self, name: str, *tensors: Any) -> None:
        """Count a launch that reads or writes these tensors."""
        self.launches[name] += 1
        self.num_bytes[name] += sum(
            each.nbytes
            for each in tensors
            if isinstance(each, Tensor) and each.dim() == 2 and self._widths & {*each.shape}
        )

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        name = op.name().partition(".")[0]
        if name.startswith(WRITES_ONLY):
            self.add(name, *args)
        elif not op.is_view and not name.startswith(FREE):
            # An operation in place both reads and writes its first argument.
            self.add(name, *args, kwargs.get("out", result))
        return result


class _Kernel:
    """Takes the place of a Triton kernel: counts a launch and the tensors that it touches."""

    def __init__(self, counting: Counting, name: str, touches: Any) -> None:
        self._counting, self._name, self._touches = counting, name, touches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **_: self._counting.add(self._name, *self._touches(*args))


def count_pair_loss(
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    vocab_size: int,
    hidden_size: int,
    upstream: float | None,
) -> Counting:
    """Forward and backward of `linear_pair_loss` by "triton_fused" in bf16."""
    counting = Counting(vocab_size, hidden_size)
    _pretend_gpu(monkeypatch, counting)
    shape = {"dtype": torch.bfloat16, "device": "meta"}
    leaves = [
        torch.empty(sum(lengths), hidden_size, **shape).requires_grad_(),
        torch.empty(vocab_size, hidden_size, **shape).requires_grad_(),
    ]
    labels = torch.empty(sum(lengths), dtype=torch.int64, device="meta")
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    loss, options = make_loss("sigmoid", beta=0.1), HeadOptions(upstream=upstream)
    refs = torch.zeros(len(lengths), dtype=torch.float64)
    pairs_triton.settings_of(loss, torch.device("meta"))  # copied in a process's first call alone
    with counting:
        output = linear_pair_loss(*leaves, labels, bounds, refs, loss, options)
        torch.autograd.grad(output.loss, leaves)
    return counting


def _pretend_gpu(monkeypatch: pytest.MonkeyPatch, counting: Counting) -> None:
    """Let the meta device take the ways of sm_90."""
    monkeypatch.setattr(dispatch, "backend_for", lambda *_: "triton_fused")
    monkeypatch.setattr(dispatch, "compute_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no meta
    for module in (dtypes, matmul):
        monkeypatch.setattr(module, "has_wide_products", lambda device, dtype: True)
    for module in (finish_triton, fused_triton, pairs_triton):
        monkeypatch.setattr(
            module, "launch_options", lambda name, device: launch_table()["sm_90"][name]
        )
    monkeypatch.setattr(fused_triton, "tile_sources", lambda x, w, tiles: (x, w))
    monkeypatch.setattr(fused_triton, "tile_target", lambda d_logits, unused, tiles: d_logits)
    monkeypatch.setattr(autograd, "rescale", lambda tensor, *_: counting.add("rescale") or tensor)
    touches = {
        # Rows of the weight, as many as of the hidden states.
        "target_products": lambda x, *_: (x, x),
        "score_tiles": lambda x, w, d_logits, *_: (x, w, d_logits),
    }
    for name, touched in touches.items():
        kernel = _Kernel(counting, name, touched)
        monkeypatch.setattr(fused_triton, f"{name}_kernel", kernel)
    for module, name in ((pairs_triton, "pair_loss"), (finish_triton, "finish_rows")):
        kernel = _Kernel(counting, name, lambda *_: ())
        monkeypatch.setattr(module, f"{name}_kernel", kernel)
    monkeypatch.setattr(fused_triton, "is_interpreted", lambda kernel: False)
