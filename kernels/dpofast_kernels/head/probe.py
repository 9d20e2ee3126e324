"""A short check for the start of a run: does the head's back end agree with the naive one?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from dpofast_kernels.head.backends import backend_for
from dpofast_kernels.head.dispatch import linear_pair_loss, linear_scores
from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.preference import make_loss
from dpofast_kernels.rounding import product_precision

# Scored tokens of each sequence. On a device there are more of them than a tile has rows.
_LENGTHS, _CPU_LENGTHS = (70, 33, 1, 1, 150, 40), (7, 3, 1, 1, 15, 4)
# The vocabularies: an odd one, and one that is a multiple of as much as the run's.
_ODD, _EVEN = 1003, 1024
# A chunk of these rows or fewer makes the case take several chunks and pairs longer than a chunk.
_CHUNK_ROWS, _CPU_CHUNK_ROWS = 80, 10
# Gradients are made with this upstream gradient.
_UPSTREAM = 0.37
# Largest norm of the difference from the naive result, relative to the norm of that result. Log-
# probs are made of products that aren't rounded below fp32, or TF32 where a user allows that.
_LOGPS_TOLERANCE = 5e-3
_TOLERANCES = {
    torch.bfloat16: 3e-2,
    torch.float16: 5e-3,
    torch.float32: 1e-3,
    torch.float64: 1e-10,
}


class WrongHeadError(RuntimeError):
    """On this device, a back end of the head fails, or its results differ from the naive ones.

    Attributes:
        backend: its name.
    """

    def __init__(self, backend: str, message: str) -> None:
        super().__init__(message)
        self.backend = backend


@dataclass(frozen=True)
class HeadTraits:
    """What the kernels of a head depend on.

    Attributes:
        dtype: dtype that the head computes in.
        hidden_size: H.
        vocab_size: V, of which the check uses the remainder by 16 alone.
        has_bias: whether there is a bias.
        softcap, logit_scale, backend: as in `HeadOptions`.
    """

    dtype: torch.dtype
    hidden_size: int
    vocab_size: int
    has_bias: bool = False
    softcap: float | None = None
    logit_scale: float = 1.0
    backend: str = "auto"


def probe_head(device: torch.device | str, traits: HeadTraits) -> str:
    """Compare the back end that runs on a device with the naive one in fp64.

    Log-probs and all gradients are compared, of a call in one chunk and of one in several.

    Args:
        device: where to run.
        traits: the head.

    Returns:
        The name of the back end.

    Raises:
        ValueError: the back end that the traits name doesn't run on this device, or not in this
            dtype.
        torch.OutOfMemoryError: the device had no memory for the check.
        WrongHeadError: the two differ by more than rounding, or the back end fails. The message
            names the back end, the tensor that differs, and by how much.

    Example:
        >>> import torch
        >>> from dpofast_kernels.head import HeadTraits, probe_head
        >>> probe_head("cpu", HeadTraits(torch.float32, hidden_size=16, vocab_size=1000))
        'torch'
    """
    device = torch.device(device)
    weight = torch.empty(1, 1, dtype=traits.dtype, device=device)
    backend = backend_for(weight, HeadOptions(backend=traits.backend))
    options = HeadOptions(
        softcap=traits.softcap, logit_scale=traits.logit_scale, upstream=_UPSTREAM, backend=backend
    )
    rows = _CPU_CHUNK_ROWS if device.type == "cpu" else _CHUNK_ROWS
    for vocab_size in dict.fromkeys((_ODD, _EVEN + traits.vocab_size % 16)):
        leaves, labels = _inputs(device, traits, vocab_size)
        exact = {name: leaf.double() for name, leaf in leaves.items()}
        truth = _run(exact, labels, replace(options, backend="naive"))
        for limit in (None, rows * vocab_size * torch.float32.itemsize):
            found = _attempt(leaves, labels, replace(options, workspace_bytes=limit))
            _compare(found, truth, backend, traits.dtype, device)
    return backend


def _inputs(
    device: torch.device, traits: HeadTraits, vocab_size: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The leaves of a case, and its labels [N]."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, traits.dtype)

    num_rows = sum(_CPU_LENGTHS if device.type == "cpu" else _LENGTHS)
    # Logits of size 1 or so, and of at most the cap's, whatever the model multiplies them by.
    scale = 1.0 / (traits.hidden_size**0.5 * traits.logit_scale)
    leaves = {
        "hidden_states": random(num_rows, traits.hidden_size),
        "weight": random(vocab_size, traits.hidden_size, scale=scale),
    }
    if traits.has_bias:
        leaves["bias"] = random(vocab_size, scale=1.0 / traits.logit_scale)
    labels = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    return leaves, labels.to(device)


def _attempt(leaves: dict[str, Tensor], labels: Tensor, options: HeadOptions) -> dict[str, Tensor]:
    try:
        return _run(leaves, labels, options)
    except torch.OutOfMemoryError:  # says nothing about the back end
        raise
    except Exception as error:  # compilers can raise anything
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise WrongHeadError(
            options.backend,
            f"Head backend {options.backend!r} doesn't run on {labels.device} ({reason})",
        ) from error


def _run(leaves: dict[str, Tensor], labels: Tensor, options: HeadOptions) -> dict[str, Tensor]:
    """Log-probs by both ops, and the gradient of each leaf."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    options = replace(options, bias=leaves.get("bias"))
    hidden_states, weight = leaves["hidden_states"], leaves["weight"]
    lengths = _CPU_LENGTHS if labels.device.type == "cpu" else _LENGTHS
    bounds = torch.tensor(list(accumulate(lengths, initial=0)))
    ref_logps = -7.0 * bounds.diff().double()
    with torch.autocast(labels.device.type, enabled=False), torch.enable_grad():
        scores = linear_scores(hidden_states, weight, labels, options)
        loss = make_loss("sigmoid", beta=0.1)
        output = linear_pair_loss(hidden_states, weight, labels, bounds, ref_logps, loss, options)
        gradients = torch.autograd.grad(output.loss * _UPSTREAM, list(leaves.values()))
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"log-probs": scores[0], "log-sum-exps": scores[1], "sums": output.logps, **named}


def _compare(
    found: dict[str, Tensor],
    truth: dict[str, Tensor],
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    of_gradients = _TOLERANCES[product_precision(dtype, device)]
    for name, expected in truth.items():
        tolerance = of_gradients if name.startswith("gradient") else _LOGPS_TOLERANCE
        error = ((found[name].double() - expected).norm() / expected.norm()).item()
        if not error <= tolerance:  # NaN is an error, too
            raise WrongHeadError(
                backend,
                f"Head backend {backend!r} is wrong on {device}: the error of its {name} in "
                f"{dtype} is {error:.1e}, expected at most {tolerance:.0e}",
            )
