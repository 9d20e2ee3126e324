"""Times the head with its loss, forward and backward, in chunks and with all logits at once.

python -m benchmarks.head --pairs 8 --tokens 64 --hidden 256 --vocab 16000
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dpofast.summary import hardware, versions
from dpofast_kernels import HeadOptions, linear_pair_loss, make_loss


@dataclass(frozen=True)
class Shape:
    """P pairs with two answers of `tokens` each, through a head [vocab, hidden]."""

    pairs: int
    tokens: int
    hidden: int
    vocab: int
    dtype: str


@dataclass(frozen=True)
class Inputs:
    """What `linear_pair_loss` takes."""

    hidden_states: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]
    bounds: Tensor  # [2P+1]
    ref_logps: Tensor  # [2P]


def make_inputs(shape: Shape, device: str) -> Inputs:
    """Random inputs; both floating ones get gradients."""
    generator = torch.Generator().manual_seed(0)
    num_rows = 2 * shape.pairs * shape.tokens
    dtype = getattr(torch, shape.dtype)

    def normal(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator) * shape.hidden**-0.5
        return values.to(device, dtype).requires_grad_()

    return Inputs(
        hidden_states=normal(num_rows, shape.hidden),
        weight=normal(shape.vocab, shape.hidden),
        labels=torch.randint(shape.vocab, (num_rows,), generator=generator).to(device),
        bounds=torch.arange(2 * shape.pairs + 1) * shape.tokens,
        ref_logps=torch.full((2 * shape.pairs,), -10.0 * shape.tokens, dtype=torch.float64),
    )


def run_once(inputs: Inputs, backend: str) -> float:
    """Seconds of one forward and backward."""
    inputs.hidden_states.grad = inputs.weight.grad = None
    is_cuda = inputs.weight.is_cuda
    if is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    output = linear_pair_loss(
        inputs.hidden_states,
        inputs.weight,
        inputs.labels,
        inputs.bounds,
        inputs.ref_logps,
        make_loss("sigmoid", beta=0.1),
        HeadOptions(backend=backend),
    )
    output.loss.backward()  # type: ignore[no-untyped-call]
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(shape: Shape, backends: list[str], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each backend; rounds take turns, so that all see the same machine."""
    inputs = make_inputs(shape, device)
    seconds: dict[str, list[float]] = {backend: [] for backend in backends}
    for round_number in range(rounds + 1):
        for backend, found in seconds.items():
            elapsed = run_once(inputs, backend)
            if round_number:  # the first round warms up
                found.append(elapsed)
    return {backend: 1e3 * statistics.median(found) for backend, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("pairs", 8), ("tokens", 64), ("hidden", 256), ("vocab", 16000)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape(given.pairs, given.tokens, given.hidden, given.vocab, given.dtype)
    backends = ["naive", "torch", "triton"] if device == "cuda" else ["naive", "torch"]
    result = {
        "milliseconds": measure(shape, backends, given.rounds, device),
        "shape": asdict(shape),
        "rounds": given.rounds,
        "hardware": hardware(),
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
