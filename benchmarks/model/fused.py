"""Stand-ins for fused layers: a norm, a rotation and a gated activation as one kernel each.

They compute nothing. Each reads its inputs once and writes its results once, forward and backward,
as Liger's kernels do.
"""

# `torch.autograd.Function.apply` has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

Charge = Callable[[float], None]


class _Norm(torch.autograd.Function):
    """RMSNorm: the backward reads the input and the gradient, and sums the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, charge: Charge) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.charge = charge
        charge(2 * x.nbytes + weight.nbytes)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        ctx.charge(3 * x.nbytes + weight.nbytes)
        return torch.empty_like(x), torch.empty_like(weight), None


class _Gate(torch.autograd.Function):
    """act(gate) * up; the backward computes the activation again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, charge: Charge) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.charge = charge
        charge(3 * gate.nbytes)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        ctx.charge(5 * gate.nbytes)
        return torch.empty_like(gate), torch.empty_like(up), None


class _Rotation(torch.autograd.Function):
    """RoPE of queries and keys in one kernel, in place."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, charge: Charge) -> tuple[Tensor, Tensor]:
        ctx.charge = charge
        charge(2 * (query.nbytes + key.nbytes))
        return torch.empty_like(query), torch.empty_like(key)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.charge(2 * sum(each.nbytes for each in gradients))
        d_query, d_key = (torch.empty_like(each) for each in gradients)
        return d_query, d_key, None


@contextlib.contextmanager
def fused_layers(model: nn.Module, charge: Charge) -> Iterator[None]:
    """Inside the `with` block, a model's norms, rotations and MLPs run as the stand-ins.

    Args:
        model: a model whose layers are named as Llama's are.
        charge: function that counts a kernel by the bytes that it reads and writes.
    """

    def norm(module: Any) -> Any:
        return lambda x: _Norm.apply(x, module.weight, charge)

    def mlp(module: Any) -> Any:
        return lambda x: module.down_proj(
            _Gate.apply(module.gate_proj(x), module.up_proj(x), charge)
        )

    def rotate(query: Tensor, key: Tensor, *_: Any, **__: Any) -> Any:
        return _Rotation.apply(query, key, charge)

    modeling = sys.modules[type(model).__module__]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(modeling, "apply_rotary_pos_emb", rotate))
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                stack.enter_context(mock.patch.object(module, "forward", norm(module)))
            elif type(module).__name__.endswith("MLP"):
                stack.enter_context(mock.patch.object(module, "forward", mlp(module)))
        yield
