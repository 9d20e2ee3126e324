"""A short check for the start of a run: does the chosen back end agree with the naive one?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dpofast_kernels.attention.dispatch import DEFAULT_OPTIONS, backend_for, shared_attention
from dpofast_kernels.attention.layout import SharedLayout, build_layout
from dpofast_kernels.attention.options import AttentionOptions
from dpofast_kernels.rounding import product_precision

# Some groups have one tail, others several. Some tails are empty, some have one token, and some are
# longer than the kernels' blocks of 64 and 128 tokens. A CPU has no such blocks, so shorter groups
# test the same there in less time.
_GROUPS = ((150, (70, 33)), (1, (1, 1)), (40, (0, 130)), (5, (3, 0, 17)), (9, (0,)))
_CPU_GROUPS = ((20, (11, 6)), (1, (1, 1)), (7, (0, 15)), (5, (3, 0, 9)), (9, (0,)))
# The tested window, or chunk, is limited: a model's own can be longer than these sequences and
# would then hide nothing. It is at least 2, because with 1 the softmax is constant and its
# gradients are mere rounding.
_SHORTEST_WINDOW, _LONGEST_WINDOW, _CPU_LONGEST_WINDOW = 2, 48, 8
# Largest norm of the difference from the naive result, relative to the norm of that result.
# Rounding a product's inputs to bf16 gives up to 1e-2; a wrong mask, scale or copy gives more than
# 1e-1.
_TOLERANCES = {
    torch.bfloat16: 3e-2,
    torch.float16: 5e-3,
    torch.float32: 1e-3,
    torch.float64: 1e-10,
}


class WrongBackendError(RuntimeError):
    """A back end computes something other than attention on this device."""


def probe(
    device: torch.device | str,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    options: AttentionOptions = DEFAULT_OPTIONS,
) -> str:
    """Compare the back end that `options` choose with the naive one, gradients included.

    Args:
        device: where to run.
        dtype: dtype of queries, keys and values.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: head size of queries and keys.
        value_dim: head size of values.
        options: options of a layer.

    Returns:
        The name of the back end.

    Raises:
        WrongBackendError: the two back ends differ by more than rounding. The message names the
            back end, the tensor that differs, and by how much.
        ValueError: the back end asked for can't run.

    Example:
        >>> import torch
        >>> from dpofast_kernels.attention import probe
        >>> probe("cpu", torch.float32, num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16)
        'sdpa'
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
    longest = _CPU_LONGEST_WINDOW if is_cpu else _LONGEST_WINDOW
    window, chunk = (_tested(size, longest) for size in (options.window, options.chunk))
    options = replace(options, window=window, chunk=chunk)
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


def _tested(size: int | None, longest: int) -> int | None:
    """The window or chunk that is tested in place of a model's own."""
    return None if size is None else max(_SHORTEST_WINDOW, min(size, longest))


def _run(
    leaves: dict[str, Tensor], d_output: Tensor, layout: SharedLayout, options: AttentionOptions
) -> dict[str, Tensor]:
    """The output of `shared_attention`, and the gradient of each leaf."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    options = replace(options, sinks=leaves.get("sinks"))
    with torch.autocast(d_output.device.type, enabled=False), torch.enable_grad():
        out = shared_attention(leaves["query"], leaves["key"], leaves["value"], layout, options)
        gradients = torch.autograd.grad(out, list(leaves.values()), d_output)
    return {
        "output": out.detach(),
        **{f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)},
    }
