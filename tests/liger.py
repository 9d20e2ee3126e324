"""Plain twins of Liger's layers, which need no GPU, in place of the package `liger_kernel`."""

from __future__ import annotations

import sys
from collections import Counter
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama import modeling_llama

KINDS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
calls: Counter[str] = Counter()


class LigerRMSNorm(torch.nn.Module):
    """Its forward and its name are what the patch binds to a layer."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        calls["norm"] += 1
        wide = hidden_states.double()
        scale = (wide.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * (wide * scale).to(hidden_states.dtype)


class LigerSwiGLUMLP(torch.nn.Module):
    def forward(self: Any, x: Tensor) -> Tensor:
        calls["mlp"] += 1
        gate = self.gate_proj(x)
        return self.down_proj(gate * gate.sigmoid() * self.up_proj(x))


def liger_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """One row of cosines for each token, as the kernel reads them; a row for all or for each."""
    calls["rope"] += 1
    rows = q.shape[0] * q.shape[2]
    cos, sin = (t.expand(q.shape[0], -1, -1).reshape(rows, -1) for t in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        flat = x.transpose(1, 2).reshape(rows, x.shape[1], x.shape[3])
        width = cos.shape[-1]
        part, rest = flat[..., :width], flat[..., width:]
        low, high = part.chunk(2, -1)
        c, s = (t[:, None, : width // 2].to(x.dtype) for t in (cos, sin))
        part = torch.cat([low * c - high * s, high * c + low * s, rest], -1)
        return part.reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)

    return turned(q), turned(k)


def _patch(model: Any, **kinds: bool) -> None:
    """Patches a Llama as Liger does: its Python module, and the layers of the model."""
    if model.config.model_type != "llama":
        return
    assert not kinds.pop("cross_entropy")
    assert not kinds.pop("fused_linear_cross_entropy")
    if kinds.get("rope", True):
        modeling_llama.apply_rotary_pos_emb = liger_rotary_pos_emb
    modeling_llama.LlamaRMSNorm = LigerRMSNorm  # type: ignore[misc,assignment]
    norms = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    mlps = [m for m in model.modules() if type(m).__name__ == "LlamaMLP"]
    for modules, twin in ((norms, LigerRMSNorm), (mlps, LigerSwiGLUMLP)):
        for module in modules:
            module.forward = MethodType(twin.forward, module)
            module._get_name = lambda twin=twin: twin.__name__


def allow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Liger's layers run on a CPU."""
    for module in ("options", "model"):
        monkeypatch.setattr(f"dpofast.{module}.liger.DEVICE_TYPES", {"cpu", "cuda"})


def install_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the twins in place of the package, and let them run on a CPU."""
    package, inner = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    inner._apply_liger_kernel_to_instance = _patch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr("dpofast.options.liger._is_here", lambda: True)
    allow_cpu(monkeypatch)
    calls.clear()


class TwinOf:
    """A plain function where Liger calls `Function.apply`."""

    def __init__(self, function: Any) -> None:
        self.apply = function


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, *_: Any) -> Tensor:
    normal = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return normal if weight is None else normal * (offset + weight)


def _silu_mul(gate: Tensor, up: Tensor, by_gate: float = 1.0, by_down: float = 1.0) -> Tensor:
    return F.silu(gate * by_gate) * up * by_down


def _experts(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    outputs = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        rows, slots = (index == expert).nonzero(as_tuple=True)
        gate, up = (x[rows] @ gate_up[expert].T).chunk(2, -1)
        part = (F.silu(gate) * up) @ down[expert].T * weights[rows, slots, None]
        outputs = outputs.index_add(0, rows, part.to(x.dtype))
    return outputs


def _relu_squared(x: Tensor) -> Tensor:
    calls["activation"] += 1
    return F.relu(x).square()


def _rope(_: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **more: Any) -> Any:
    if (width := more.get("rotary_dim")) is not None:
        cos, sin = (torch.cat([t, t], -1)[..., :width] for t in (cos, sin))
    return liger_rotary_pos_emb(q, k, cos, sin)


def install_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put plain functions in place of the kernels of the installed package, and run on a CPU."""
    place = "liger_kernel.transformers."
    for name, function in {
        "rms_norm.LigerRMSNormFunction": _rms_norm,
        "swiglu.LigerSiLUMulFunction": _silu_mul,
        "swiglu.LigerFusedMoEFunction": _experts,
        "geglu.LigerGELUMulFunction": lambda a, b: F.gelu(a, approximate="tanh") * b,
        "relu_squared.LigerReLUSquaredFunction": _relu_squared,
    }.items():
        monkeypatch.setattr(place + name, TwinOf(function))
    monkeypatch.setattr(place + "rope.dispatch", _rope)
    allow_cpu(monkeypatch)
    calls.clear()
