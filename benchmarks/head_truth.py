"""The right results of a case of the head's benchmark, and the rule that judges contenders.

A result is compared with formulas in fp64. Errors of up to MULTIPLE times those of naive PyTorch in
the same dtype, plus FLOORS, are allowed. Neither the formulas nor naive PyTorch shares code with a
contender.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Verdict
from benchmarks.head_cases import BETA, Inputs, Outputs, sequence_sums

# The largest of many rounding errors is a matter of chance: the same roundings in another order can
# make it this many times larger.
MULTIPLE = 3.0
# Keys are those of `errors_of`: nats for log-probs and loss, relative for gradients.
FLOORS: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {
        "per_token_logps": 1e-5,
        "logps": 1e-4,
        "loss": 1e-5,
        "d_hidden_states": 1e-5,
        "d_weight": 1e-5,
    },
    torch.bfloat16: {
        "per_token_logps": 1e-4,
        "logps": 1e-3,
        "loss": 1e-4,
        "d_hidden_states": 3e-3,
        "d_weight": 3e-3,
    },
}
VOCAB_BLOCK = 16384
GRADIENTS = ("d_hidden_states", "d_weight")


@dataclass(frozen=True, eq=False)
class Truth:
    """Right results of a case, shaped as in `Outputs`; `pair_losses` are [P]."""

    per_token_logps: Tensor
    logps: Tensor
    pair_losses: Tensor
    d_hidden_states: Tensor
    d_weight: Tensor


@torch.no_grad()
def find_truth(inputs: Inputs) -> Truth:
    """Compute log-probs, loss and gradients in fp64 from their formulas, one pair at a time.

    A pair contributes -log sigmoid(m) / P to the loss, with m = beta (chosen - rejected log-ratio).
    Its derivative with respect to the chosen answer's log-prob is c = -beta sigmoid(-m) / P, and
    with respect to the rejected answer's c = +beta sigmoid(-m) / P. With p = softmax(z), the
    derivative with respect to the logits z of a position is c (onehot - p).
    """
    weight = inputs.weight.double()  # [V, H]
    limits = inputs.limits
    num_pairs = len(limits) // 2
    per_token, losses, d_hidden_states = [], [], []
    d_weight = torch.zeros_like(weight)
    for pair in range(num_pairs):
        start, middle, end = limits[2 * pair : 2 * pair + 3]
        x, labels = inputs.hidden_states[start:end].double(), inputs.labels[start:end, None]
        z = x @ weight.t()  # [n, V]
        # In place, z becomes the log-probs: a second [n, V] in fp64 would take too much memory.
        z -= z.logsumexp(-1, keepdim=True)
        logps = z.gather(-1, labels)[:, 0]
        ref_chosen, ref_rejected = inputs.ref_logps[2 * pair : 2 * pair + 2].double()
        chosen, rejected = logps[: middle - start].sum(), logps[middle - start :].sum()
        margin = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
        losses.append(torch.log1p(torch.exp(-margin.abs())) + (-margin).clamp(min=0.0))
        coefficients = torch.full_like(logps, BETA / num_pairs) * torch.sigmoid(-margin)  # [n]
        coefficients[: middle - start] *= -1.0
        # c (onehot - p), again in place.
        d_z = z.exp_().neg_()
        d_z.scatter_add_(-1, labels, torch.ones_like(d_z[:, :1]))
        d_z *= coefficients[:, None]
        per_token.append(logps)
        d_hidden_states.append(d_z @ weight)
        d_weight.addmm_(d_z.t(), x)
    per_token_logps = torch.cat(per_token)
    return Truth(
        per_token_logps,
        sequence_sums(per_token_logps, inputs.bounds),
        torch.stack(losses),
        torch.cat(d_hidden_states),
        d_weight,
    )


def naive_in_dtype(inputs: Inputs) -> Truth:
    """Run naive PyTorch with autograd in the inputs' dtype, one pair at a time: the baseline.

    The weight's gradient is summed over pairs in fp32 and rounded to the inputs' dtype at the end.
    """
    limits = inputs.limits
    num_pairs = len(limits) // 2
    weight = inputs.weight.detach().requires_grad_()
    per_token, losses, d_hidden_states = [], [], []
    d_weight = torch.zeros_like(weight, dtype=torch.float32)
    for pair in range(num_pairs):
        start, middle, end = limits[2 * pair : 2 * pair + 3]
        x = inputs.hidden_states[start:end].detach().requires_grad_()
        all_logps = (x @ weight.t()).log_softmax(-1, dtype=torch.float32)  # [n, V]
        logps = all_logps.gather(-1, inputs.labels[start:end, None])[:, 0]
        del all_logps
        parts = (logps[: middle - start], logps[middle - start :])
        sums = torch.stack([part.double().sum() for part in parts])
        logratios = sums - inputs.ref_logps[2 * pair : 2 * pair + 2]
        loss = -F.logsigmoid(BETA * (logratios[0] - logratios[1]))
        gradients = torch.autograd.grad(loss / num_pairs, [x, weight])
        per_token.append(logps.detach())
        losses.append(loss.detach())
        d_hidden_states.append(gradients[0])
        d_weight += gradients[1]
    per_token_logps = torch.cat(per_token).double()
    return Truth(
        per_token_logps,
        sequence_sums(per_token_logps, inputs.bounds),
        torch.stack(losses),
        torch.cat(d_hidden_states),
        d_weight.to(weight.dtype),
    )


class Judge:
    """Judges results by the truth and by the errors that naive PyTorch makes."""

    def __init__(self, inputs: Inputs) -> None:
        self.truth = find_truth(inputs)
        naive = naive_in_dtype(inputs)
        errors = errors_of(self.truth, Outputs(**_tensors(naive)))
        # Errors of the pairs' losses can cancel in the mean loss by chance, so take the mean of the
        # absolute errors.
        pair_errors = (naive.pair_losses - self.truth.pair_losses).abs()
        errors["loss"] = float(pair_errors.mean())
        self.naive_errors = errors
        floors = FLOORS[inputs.weight.dtype]
        self.bounds = {name: MULTIPLE * errors[name] + floor for name, floor in floors.items()}

    def forward(self, outputs: Outputs, gradient_error: float = 0.0) -> Verdict:
        """Judge only the log-probs."""
        return self._verdict(outputs, (), gradient_error)

    def forward_backward(self, outputs: Outputs, gradient_error: float = 0.0) -> Verdict:
        """Judge log-probs, loss and gradients; `gradient_error` can raise the gradients' bound."""
        return self._verdict(outputs, ("loss", *GRADIENTS), gradient_error)

    def _verdict(self, outputs: Outputs, needed: tuple[str, ...], gradient_error: float) -> Verdict:
        missing = [name for name in needed if getattr(outputs, name) is None]
        if missing or (outputs.per_token_logps is None and outputs.logps is None):
            raise ValueError(f"the result lacks {', '.join(missing) or 'log-probs'}")
        errors = errors_of(self.truth, outputs)
        bounds = {name: self.bounds[name] for name in errors}
        for name in GRADIENTS:
            if name in bounds:
                bounds[name] = max(bounds[name], gradient_error)
        return Verdict(errors, bounds)


def errors_of(truth: Truth, outputs: Outputs) -> dict[str, float]:
    """Largest absolute errors of log-probs and loss, relative Frobenius errors of gradients.

    Results that are None are left out.
    """
    errors: dict[str, float] = {}
    for name in ("per_token_logps", "logps"):
        given = getattr(outputs, name)
        if given is not None:
            errors[name] = _largest(given.detach().double() - getattr(truth, name))
    if outputs.loss is not None:
        errors["loss"] = _largest(outputs.loss.detach().double() - truth.pair_losses.mean())
    for name in GRADIENTS:
        given = getattr(outputs, name)
        if given is not None:
            errors[name] = _relative_frobenius(given, getattr(truth, name))
    return errors


def _largest(differences: Tensor) -> float:
    """The largest absolute value; NaN if any is NaN."""
    return float(differences.abs().max())


def _relative_frobenius(given: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error, a block at a time: a copy of d_weight in fp64 would be large."""
    differences = norms = torch.zeros((), dtype=torch.float64, device=exact.device)
    for start in range(0, len(exact), VOCAB_BLOCK):
        rows = slice(start, start + VOCAB_BLOCK)
        differences = differences + (given[rows].double() - exact[rows]).square().sum()
        norms = norms + exact[rows].square().sum()
    return float((differences / norms).sqrt())


def _tensors(truth: Truth) -> dict[str, Any]:
    """The results that `Outputs` has fields for."""
    names = {each.name for each in fields(Outputs)} & {each.name for each in fields(Truth)}
    return {name: getattr(truth, name) for name in names}
