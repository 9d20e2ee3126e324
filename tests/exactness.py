"""Compares a laid-out micro-batch with separate sequences: hidden states, loss, gradients."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast.data.packing.batch import PackedPairs, TokenIds
from dpofast.data.packing.collate import Layout
from dpofast.model.forward import micro_batch, run_batch
from dpofast.model.head import PairLossTask, head_options
from dpofast.model.parts import body_of, causal_lm
from dpofast_kernels import make_loss
from tests.families import VOCAB_SIZE
from tests.support import float64_throughout

# Numbers of tokens: prompt, common start of the answers, rest of chosen, rest of rejected.
_SHORT_PAIRS = (
    *((13, 0, 7, 9), (5, 3, 11, 1), (20, 0, 3, 17)),
    *((1, 2, 4, 6), (4, 5, 0, 3), (6, 4, 2, 0)),
)
Sequences = Sequence[tuple[TokenIds, TokenIds]]


@dataclass(frozen=True)
class Case:
    """Pairs as (prompt ids, answer ids), chosen and rejected in turn, and what their loss needs."""

    sequences: Sequences
    ref_logps: list[float]
    beta: float


def _short_sequences() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(1, VOCAB_SIZE, (count,), generator=generator).tolist()

    found = []
    for prompt, common, chosen, rejected in _SHORT_PAIRS:
        prompt_ids, common_ids = ids(prompt), ids(common)
        found += [(prompt_ids, common_ids + ids(chosen)), (prompt_ids, common_ids + ids(rejected))]
    return found


def case_of(sequences: Sequences, beta: float, per_token: float = -3.0) -> Case:
    """Add reference log-probs as a model could give them, different for each sequence."""
    ref_logps = [per_token * len(answer) - 0.05 * i for i, (_, answer) in enumerate(sequences)]
    return Case(sequences, ref_logps, beta)


SHORT = case_of(_short_sequences(), beta=0.7)


class Outcome:
    """Loss, hidden states at the scored positions, and the gradients of all parameters."""

    def __init__(self, model: Any, loss: Tensor, hidden_states: Tensor) -> None:
        self.loss, self.hidden_states = loss.detach(), hidden_states.detach()
        self.gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }


def separate(model: Any, case: Case) -> Outcome:
    """Run every sequence separately through the stock model, as in textbook DPO."""
    model.zero_grad()
    losses, states = [], []
    body = body_of(causal_lm(model))
    handle = body.register_forward_hook(lambda _, __, output: states.append(output[0][0]))
    scored, logratios = [], []
    for (prompt, answer), ref_logp in zip(case.sequences, case.ref_logps, strict=True):
        input_ids = torch.tensor([[*prompt, *answer]])
        logits = model(input_ids, use_cache=False, **_logits_kept(model, len(answer) + 1)).logits
        logps = logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        logratios.append(logps.gather(-1, torch.tensor(answer)[:, None]).sum() - ref_logp)
        # Counted from the end: Gemma 4 computes its last layers for the kept positions only.
        scored.append(states.pop()[-len(answer) - 1 : -1].detach())
        if len(logratios) == 2:
            losses.append(-F.logsigmoid(case.beta * (logratios[0] - logratios[1])))
            losses[-1].backward()
            logratios.clear()
    handle.remove()
    return Outcome(model, torch.stack(losses).sum(), torch.cat(scored))


def _logits_kept(model: Any, count: int) -> dict[str, int]:
    """Arguments that skip the prompt's logits, which nobody needs; {} if the model takes none."""
    parameters = inspect.signature(causal_lm(model).forward).parameters
    return {"logits_to_keep": count} if "logits_to_keep" in parameters else {}


def laid_out(model: Any, case: Case, layout: Layout) -> Outcome:
    """Run all pairs in one micro-batch, the way the trainer does."""
    model.zero_grad()
    lm = causal_lm(model)
    batch = layout.collate(case.sequences, case.ref_logps)
    loss = make_loss("sigmoid", beta=case.beta)
    options = head_options(lm.config)
    task = PairLossTask(batch.labels, batch.bounds, batch.ref_logps, loss, options)
    return Outcome(model, *run_task(model, batch, task))


def run_task(model: Any, batch: PackedPairs, task: PairLossTask) -> tuple[Tensor, Tensor]:
    """Run a micro-batch forward and backward: its loss, and the hidden states that are scored."""
    scored = []

    def spy(hidden_states: Tensor, *weights: Any) -> Any:
        scored.append(hidden_states)
        return task(hidden_states, *weights)

    with micro_batch(model, batch):
        total, *_ = run_batch(model, batch, spy)
        total.backward()
    return total, scored[0]


def compare(model: Any, case: Case, layout: Layout) -> None:
    """Assert that laid-out and separate sequences give the same, in float64; see `assert_alike`."""
    with float64_throughout():
        expected = separate(model, case)
        found = laid_out(model, case, layout)
    assert_alike(found, expected)


def assert_alike(found: Outcome, expected: Outcome) -> None:
    """Assert equality within 1e-12 for hidden states and 1e-10 for loss and gradients.

    Tolerances are relative to the largest hidden state and the largest gradient.
    """
    scale = expected.hidden_states.abs().max()
    assert (found.hidden_states - expected.hidden_states).abs().max() <= 1e-12 * scale
    assert abs(found.loss - expected.loss) <= 1e-10 * expected.loss
    largest = max(gradient.abs().max() for gradient in expected.gradients.values())
    assert largest > 1e-3
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).abs().max() <= 1e-10 * largest, name
