"""The PyTorch back end on a GPU keeps to the memory of a call: counted on the meta device."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpofast_kernels import HeadOptions, linear_pair_loss, make_loss
from dpofast_kernels.head import dispatch, matmul, tiled
from dpofast_kernels.head.workspace import DEVICE_WORKSPACE_BYTES

pytestmark = pytest.mark.slow  # the first operations on the meta device take seconds

# What is needed beside the limit, for blocks of columns: docs/kernels.md says so, too.
BLOCKS_BYTES = 200_000_000


class Peak(TorchDispatchMode):
    """The most bytes of tensors that are made in the `with` block and exist at a time."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self._inputs = {each.untyped_storage()._cdata for each in inputs}
        self._sizes: dict[int, int] = {}
        self.num_bytes = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "meta":
            storage = result.untyped_storage()
            key = storage._cdata
            if key not in self._inputs and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, key)
                self.num_bytes = max(self.num_bytes, sum(self._sizes.values()))
        return result


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("num_pairs", [8, 64])  # 4,096 rows in one chunk, and 32,768 in several
@pytest.mark.parametrize(("vocab_size", "hidden_size"), [(151_936, 896), (256_000, 3584)])
def test_a_call_keeps_to_its_memory(vocab_size, hidden_size, num_pairs, softcap, monkeypatch):
    monkeypatch.setattr(dispatch, "compute_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no meta
    monkeypatch.setattr(tiled, "product_dtype", lambda weight: torch.bfloat16)
    monkeypatch.setattr(matmul, "has_wide_products", lambda device, dtype: True)
    num_rows, shape = 512 * num_pairs, {"dtype": torch.bfloat16, "device": "meta"}
    hidden_states = torch.empty(num_rows, hidden_size, **shape).requires_grad_()
    weight = torch.empty(vocab_size, hidden_size, **shape).requires_grad_()
    labels = torch.empty(num_rows, dtype=torch.int64, device="meta")
    bounds = 256 * torch.arange(2 * num_pairs + 1)
    refs = torch.zeros(2 * num_pairs, dtype=torch.float64)
    options = HeadOptions(backend="torch", upstream=0.5, softcap=softcap)
    with Peak(hidden_states, weight, labels) as peak:
        linear_pair_loss(
            *(hidden_states, weight, labels, bounds, refs, make_loss("sigmoid", beta=0.1)), options
        )
    of_gradients = hidden_states.nbytes + weight.nbytes + 4 * weight.numel()
    assert peak.num_bytes <= DEVICE_WORKSPACE_BYTES + BLOCKS_BYTES + of_gradients
