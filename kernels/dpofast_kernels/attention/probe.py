"""A short check, at start-up, that the chosen backend gives what the naive twin gives."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dpofast_kernels.attention.dispatch import DEFAULT_OPTIONS, backend_for, shared_attention
from dpofast_kernels.attention.layout import SharedLayout, build_layout
from dpofast_kernels.attention.options import AttentionOptions
from dpofast_kernels.rounding import product_precision

# One tail and several, of no tokens, of one, and across the kernels' blocks of 64 and 128. Without
# such blocks, on a CPU, fewer tokens tell the same in a moment.
_GROUPS = ((150, (70, 33)), (1, (1, 1)), (40, (0, 130)), (5, (3, 0, 17)), (9, (0,)))
_CPU_GROUPS = ((20, (11, 6)), (1, (1, 1)), (7, (0, 15)), (5, (3, 0, 9)), (9, (0,)))
# A model's own window may be longer than any of these sequences. With one of 1 the softmax is
# constant, and its gradients are nothing but rounding.
_SHORTEST_WINDOW, _LONGEST_WINDOW, _CPU_LONGEST_WINDOW = 2, 48, 8
# Of the norm of the difference over that of the truth. Rounding inputs of a product to bf16 gives
# up to 1e-2, a wrong mask, scale or copy gives over 1e-1.
_TOLERANCES = {
    torch.bfloat16: 3e-2,
    torch.float16: 5e-3,
    torch.float32: 1e-3,
    torch.float64: 1e-10,
}


class WrongBackendError(RuntimeError):
    """A backend that doesn't give what attention is on this device."""


def probe(
    device: torch.device | str,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    options: AttentionOptions = DEFAULT_OPTIONS,
) -> str:
    """Compare the backend that `options` choose with the naive twin, gradients included.

    Returns:
        The backend's name.

    Raises:
        WrongBackendError: they differ by more than rounding does; with the backend's name, what
            differs and by how much.
        ValueError: the backend asked for can't run.
    """
    device = torch.device(device)
    is_cpu = device.type == "cpu"
    layout = build_layout(_CPU_GROUPS if is_cpu else _GROUPS).to(device)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    num_tokens = layout.num_tokens
    leaves = {
        "query": random(num_tokens, num_heads, head_dim),
        "key": random(num_tokens, num_kv_heads, head_dim),
        "value": random(num_tokens, num_kv_heads, value_dim),
    }
    if options.sinks is not None:
        leaves["sinks"] = random(num_heads)
    if options.window is not None:
        longest = _CPU_LONGEST_WINDOW if is_cpu else _LONGEST_WINDOW
        options = replace(options, window=max(_SHORTEST_WINDOW, min(options.window, longest)))
    d_output = random(num_tokens, num_heads, value_dim)
    backend = backend_for(leaves["query"], leaves["value"], options)
    got = _run(leaves, d_output, layout, replace(options, backend=backend))
    tolerance = _TOLERANCES[product_precision(dtype, device)]
    exact = torch.promote_types(dtype, torch.float32)
    leaves = {name: leaf.to(exact) for name, leaf in leaves.items()}
    expected = _run(leaves, d_output.to(exact), layout, replace(options, backend="naive"))
    for name, truth in expected.items():
        error = ((got[name].to(exact) - truth).norm() / truth.norm()).item()
        if not error <= tolerance:  # NaN is an error, too
            raise WrongBackendError(
                f"Attention backend {backend!r} is wrong on {device}: its {name} in {dtype} is off "
                f"by {error:.1e}, expected at most {tolerance:.0e}"
            )
    return backend


def _run(
    leaves: dict[str, Tensor], d_output: Tensor, layout: SharedLayout, options: AttentionOptions
) -> dict[str, Tensor]:
    """The output, and the gradient of each leaf."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    options = replace(options, sinks=leaves.get("sinks"))
    with torch.autocast(d_output.device.type, enabled=False), torch.enable_grad():
        out = shared_attention(leaves["query"], leaves["key"], leaves["value"], layout, options)
        gradients = torch.autograd.grad(out, list(leaves.values()), d_output)
    return {
        "output": out.detach(),
        **{f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)},
    }
