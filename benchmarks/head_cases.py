"""The cases of the head's benchmark, and their inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.1  # beta of the DPO loss
# Hidden size and vocabulary size of each model.
MODELS = {
    "llama-3-8b": (4096, 128256),
    "qwen2.5-7b": (3584, 152064),
    "gemma-2-2b": (2304, 256000),
    "qwen2.5-0.5b": (896, 151936),
    "mistral-7b": (4096, 32768),
}
WEIGHT_STD = 0.02
# A position's logits have a random standard deviation in this range, before one of them is raised.
LOGIT_STD = (2.0, 3.0)
# Then one token's logit is raised by a random value from 0 to AIM. So distributions range from
# flat ones to ones whose largest probability exceeds 0.999.
AIM = 22.0
SCORED_BLOCK = 64  # positions whose labels are drawn at once
_PRODUCTS = {"forward": 1, "forward_backward": 3}


@dataclass(frozen=True)
class Case:
    """One size of the head's work.

    Attributes:
        model: name of the model with this hidden size and vocabulary.
        num_tokens: N, scored tokens.
        hidden_size: H.
        vocab_size: V.
        num_pairs: P.
        dtype: torch's name for the dtype of hidden states and weight.
        even: whether all answers have the same length.
    """

    model: str
    num_tokens: int
    hidden_size: int
    vocab_size: int
    num_pairs: int
    dtype: str
    even: bool

    @property
    def name(self) -> str:
        return f"{self.model}, N={self.num_tokens}, {self.dtype}"

    def flop(self, step: str) -> float:
        """Floating-point operations of a pass: its products, 2NHV each."""
        return _PRODUCTS[step] * 2.0 * self.num_tokens * self.hidden_size * self.vocab_size

    def as_dict(self) -> dict[str, Any]:
        """The case as it is written to JSON."""
        return {
            "name": self.name,
            "model": self.model,
            "N": self.num_tokens,
            "H": self.hidden_size,
            "V": self.vocab_size,
            "pairs": self.num_pairs,
            "dtype": self.dtype,
            "even_lengths": self.even,
        }


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of all contenders; hidden states and weight are leaves that get gradients.

    `ref_logps` were computed from `ref_hidden_states` with the same weight. Contenders that can't
    take reference log-probs get `ref_hidden_states`.
    """

    hidden_states: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]
    bounds: Tensor  # [2P+1], on the CPU
    ref_hidden_states: Tensor  # [N, H]
    ref_logps: Tensor  # [2P] fp64

    @property
    def limits(self) -> list[int]:
        return [int(limit) for limit in self.bounds]

    @property
    def gradient_bytes(self) -> int:
        return self.hidden_states.nbytes + self.weight.nbytes


@dataclass(frozen=True, eq=False)
class Outputs:
    """Results of a contender; None if it doesn't compute one.

    Attributes:
        per_token_logps: [N], nats.
        logps: [2P], nats.
        loss: [], mean over pairs.
        d_hidden_states: [N, H].
        d_weight: [V, H].
    """

    per_token_logps: Tensor | None = None
    logps: Tensor | None = None
    loss: Tensor | None = None
    d_hidden_states: Tensor | None = None
    d_weight: Tensor | None = None


def make_inputs(case: Case, device: str, targets: dict[str, Tensor] | None = None) -> Inputs:
    """Make the inputs of a case: the same in every process.

    The logits of a position have a standard deviation of 2 to 3. Then one token's logit is raised
    by a random amount. Labels are drawn from the softmax of these logits, as if the model had been
    trained on such text.

    Args:
        case: sizes and dtype.
        device: "cpu" or "cuda".
        targets: labels and ref_logps from another process; computing them costs a forward pass.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    size = (case.num_tokens, case.hidden_size)
    # In place, because a temporary of this size would raise the process' peak before a contender
    # runs.
    weight = torch.empty(case.vocab_size, case.hidden_size, dtype=dtype, device=device)
    weight.normal_(0.0, WEIGHT_STD, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        draws = torch.rand(case.num_tokens, 1, generator=generator, device=device)
        return draws * (high - low) + low

    # A standard normal hidden state gives logits with this standard deviation.
    unit = WEIGHT_STD * case.hidden_size**0.5
    noise = torch.randn(size, generator=generator, device=device)
    aimed = torch.randint(case.vocab_size, (case.num_tokens,), generator=generator, device=device)
    hidden_states = noise * uniform(*LOGIT_STD) / unit
    hidden_states += weight[aimed].float() * (uniform(0.0, AIM) / unit**2)
    drift = torch.randn(size, generator=generator, device=device) * (0.1 / unit)
    ref_hidden_states = (hidden_states + drift).to(dtype)
    hidden_states = hidden_states.to(dtype)
    bounds = bounds_of(case)
    if targets is None:
        labels = _draw_labels(hidden_states, weight, generator)
        per_token = _exact_logps(ref_hidden_states, weight.double(), labels, bounds)
        targets = {"labels": labels.cpu(), "ref_logps": sequence_sums(per_token, bounds).cpu()}
    return Inputs(
        hidden_states.requires_grad_(),
        weight.requires_grad_(),
        targets["labels"].to(device),
        bounds,
        ref_hidden_states,
        targets["ref_logps"].to(device),
    )


def bounds_of(case: Case) -> Tensor:
    """[2P+1] bounds of the answers; uneven ones have about 0.25 to 1.75 of the mean length."""
    num_sequences = 2 * case.num_pairs
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(num_sequences, generator=generator, dtype=torch.float64) * 1.5 + 0.25
    if case.even:
        shares.fill_(1.0)
    # Each answer gets one token; the remaining tokens are distributed by `shares`.
    spare = case.num_tokens - num_sequences
    ends = (shares.cumsum(0) / shares.sum() * spare).round().long()
    return F.pad(ends + torch.arange(1, num_sequences + 1), (1, 0))


def _draw_labels(hidden_states: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """[N] labels, drawn from the softmax of each position's logits."""
    draws = []
    for start in range(0, len(hidden_states), SCORED_BLOCK):
        logits = hidden_states[start : start + SCORED_BLOCK] @ weight.t()
        probs = logits.softmax(-1, torch.float32)
        draws.append(torch.multinomial(probs, 1, generator=generator))
    return torch.cat(draws)[:, 0]


def _exact_logps(hidden_states: Tensor, weight: Tensor, labels: Tensor, bounds: Tensor) -> Tensor:
    """[N] fp64 per-token log-probs, in nats, for a weight in fp64."""
    logps = []
    for rows in sequence_rows(bounds):
        z = hidden_states[rows].double() @ weight.t()
        target_logits = z.gather(-1, labels[rows, None])[:, 0]
        logps.append(target_logits - z.logsumexp(-1))
    return torch.cat(logps)


def sequence_sums(per_token_logps: Tensor, bounds: Tensor) -> Tensor:
    """[2P] fp64: sums over each sequence."""
    return torch.stack([per_token_logps[rows].double().sum() for rows in sequence_rows(bounds)])


def sequence_rows(bounds: Tensor) -> Iterator[slice]:
    """Yield the positions of each sequence."""
    for start, end in pairwise(bounds.tolist()):
        yield slice(start, end)
