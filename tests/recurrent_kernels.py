"""Emulated kernels for layers with a state: the real signatures and limits, plain functions inside.

transformers finds them as it finds the real ones.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from dpofast.model import recurrent_kernels
from dpofast.model.recurrent_families import RECURRENT_FAMILIES


@dataclass
class Kernels:
    """The emulated kernels of a model's mixers.

    Attributes:
        calls: name of the kernel and lengths of the sequences for each call; None for the lengths
            if the call names no sequences.
        boundaries: "kept"; "swallowed" for kernels that run a row as one sequence and give its one
            state; "hidden" if they give this state for each sequence, so that the shapes are right.
    """

    calls: list[tuple[str, list[int] | None]] = field(default_factory=list)
    boundaries: str = "kept"

    def lengths(self, name: str) -> list[list[int]]:
        """The sequences of each call of a kernel that names them."""
        return [lengths for called, lengths in self.calls if called == name and lengths is not None]


def install(monkeypatch: pytest.MonkeyPatch, model: Any) -> Kernels:
    """Put emulated kernels where packages would have them, and let transformers choose them."""
    kernels = Kernels()
    home = sys.modules[type(model).__module__]
    functions = {
        name: getattr(home, name) for name in RECURRENT_FAMILIES[model.config.model_type].functions
    }
    # transformers chooses a kernel where a function wraps another
    own = {name: inspect.unwrap(f) for name, f in functions.items() if hasattr(f, "__wrapped__")}
    made = {
        "causal_conv1d_fn": ("causal_conv1d", "", _convolution),
        "torch_chunk_gated_delta_rule": ("fla", "ops.gated_delta_rule", _delta_rule),
        "chunk_kimi_delta_attention": ("fla", "ops.kda", _delta_rule),
        "mamba2_chunk_scan": ("mamba_ssm", "ops.triton.ssd_combined", _state_space),
    }
    for name, function in own.items():
        package, path, make = made[name]
        kernel = make(function, kernels)
        _as_module(monkeypatch, package, path, kernel)
        chosen = use_kernel_func_from_hub_with_fallback(kernel.__name__, package)(function)
        monkeypatch.setattr(home, name, chosen)
    monkeypatch.setattr(recurrent_kernels, "KERNEL_DEVICES", frozenset({"cpu"}))
    recurrent_kernels._imported.cache_clear()
    return kernels


def _as_module(
    monkeypatch: pytest.MonkeyPatch, package: str, path: str, kernel: Callable[..., Any]
) -> None:
    """Make a function importable from `package.path`."""
    module = types.ModuleType(package)
    monkeypatch.setitem(sys.modules, package, module)
    for part in filter(None, path.split(".")):
        inner = types.ModuleType(f"{module.__name__}.{part}")
        setattr(module, part, inner)
        monkeypatch.setitem(sys.modules, inner.__name__, inner)
        module = inner
    setattr(module, kernel.__name__, kernel)


def _delta_rule(own: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    """flash-linear-attention's kernel of a delta rule, by a function of one sequence."""
    is_kimi = own.__name__ == "chunk_kimi_delta_attention"

    def kernel(
        q: Tensor,  # [B, T, H, K]
        k: Tensor,
        v: Tensor,  # [B, T, HV, V]
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,  # [N, HV, K, V]
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert scale is None
        assert not kwargs
        assert use_qk_l2norm_in_kernel
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        lengths = None if bounds is None else torch.tensor(bounds).diff().tolist()
        kernels.calls.append((kernel.__name__, lengths))

        def run(inputs: list[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor | None]:
            if state is not None:
                assert state.dtype == torch.float32
                assert state.is_contiguous()
            q, k, v, g, beta = inputs
            more = {"initial_state": state, "output_final_state": output_final_state}
            return own(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, **more)

        inputs = [q, k, v, g, beta]
        if bounds is None:
            return run(inputs, initial_state)
        count = len(bounds) - 1
        assert len(q) == 1
        assert initial_state is None or len(initial_state) == count
        if kernels.boundaries != "kept":
            output, state = run(inputs, None if initial_state is None else initial_state[:1])
            if state is not None and kernels.boundaries == "hidden":
                state = state.expand(count, *state.shape[1:])
            return output, state
        outputs, states = [], []
        for number, (start, end) in enumerate(itertools.pairwise(bounds)):
            part = [each[:, start:end] for each in inputs]
            state = None if initial_state is None else initial_state[number : number + 1]
            output, state = run(part, state)
            outputs.append(output)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states) if output_final_state else None

    kernel.__name__ = "chunk_kda" if is_kimi else "chunk_gated_delta_rule"
    return kernel


def _state_space(own: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    """mamba-ssm's kernel, which has no gradients by the states of several sequences."""

    def mamba_chunk_scan_combined(
        x: Tensor,  # [B, T, H, P]
        dt: Tensor,
        A: Tensor,  # noqa: N803 - mamba-ssm's name
        B: Tensor,  # noqa: N803
        C: Tensor,  # noqa: N803
        chunk_size: int,
        D: Tensor | None = None,  # noqa: N803
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,  # [B, H, P, N]
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        return_varlen_states: bool = False,
    ) -> Any:
        assert seq_idx is None
        assert cu_seqlens is None
        assert not return_varlen_states
        assert z is None
        kernels.calls.append(("mamba_chunk_scan_combined", [x.shape[1]]))
        if initial_states is not None:
            assert initial_states.shape == (len(x), *x.shape[2:], B.shape[-1])
            if kernels.boundaries != "kept":
                initial_states = None
        more = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "dt_bias": dt_bias, "D": D}
        states = {"initial_states": initial_states, "return_final_states": return_final_states}
        return own(x, dt, A, B, C, chunk_size, **more, **states)

    return mamba_chunk_scan_combined


def _convolution(own: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    """causal-conv1d's kernel."""

    def causal_conv1d_fn(
        x: Tensor,  # [B, C, T]
        weight: Tensor,  # [C, K]
        bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        final_states_out: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        assert seq_idx is None
        assert initial_states is None
        assert not return_final_states
        assert final_states_out is None
        assert activation in (None, "silu", "swish")
        assert 2 <= weight.shape[1] <= 4
        assert 1 in (x.stride(1), x.stride(2))
        is_channel_last = x.stride(1) == 1 and x.stride(2) > 1
        assert not is_channel_last or x.shape[1] % 8 == 0
        kernels.calls.append(("causal_conv1d_fn", [x.shape[2]]))
        return own(x, weight, bias, activation=activation)

    return causal_conv1d_fn
