"""One step of each kind of loss, in fp64: by a trainer, and as a textbook loop computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from dpofast.data.tokens.mismatched import mismatched_rows
from dpofast_kernels import make_loss
from tests.answers import answer_rows, make_kto
from tests.coupled import aot
from tests.kernels.preference.formulas import plain_formula
from tests.support import BETA, answer_logps, float64_throughout, make_trainer, tiny_llama
from tests.support import token_pairs as pairs_of

ROWS = 6  # all of them in one step
RATE = 1.0  # with plain SGD, the step's change is the gradient
SFT_WEIGHT = 0.2
SIDES = ("chosen_ids", "rejected_ids")

MeanLoss = Callable[[nn.Module, nn.Module, list[dict[str, Any]]], Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of loss: the options of a run with it, its rows, and the mean loss of a step."""

    options: dict[str, Any]
    mean_loss: MeanLoss
    rows: Callable[[], Dataset] = field(default=lambda: pairs_of(ROWS))
    has_reference: bool = True


def logps_of(model: nn.Module, pair: dict[str, Any]) -> list[Tensor]:
    """[1] each: log-probs of the chosen and of the rejected answer."""
    return [answer_logps(model, pair["prompt_ids"], pair[side]).view(1) for side in SIDES]


def logratios_of(model: nn.Module, reference: nn.Module, pair: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        others = logps_of(reference, pair)
    return [own - other for own, other in zip(logps_of(model, pair), others, strict=True)]


def lengths_of(pairs: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([[len(pair[side]) for side in SIDES] for pair in pairs])


def mean_of(name: str, *, has_reference: bool = True, **options: Any) -> MeanLoss:
    """The mean of a formula over pairs, with their weights and confidences."""

    def mean_loss(model: nn.Module, reference: nn.Module, pairs: list[dict[str, Any]]) -> Tensor:
        losses = []
        for pair in pairs:
            own = dict(options)
            if "label_confidence" in pair:
                own["label_smoothing"] = 1.0 - pair["label_confidence"]
            loss = make_loss(name, BETA, **own)
            given = logratios_of(model, reference, pair) if has_reference else logps_of(model, pair)
            found = plain_formula(loss, *given, lengths_of([pair])).sum()
            losses.append(pair.get("weight", 1.0) * found)
        return torch.stack(losses).mean()

    return mean_loss


def with_sft(model: nn.Module, reference: nn.Module, pairs: list[dict[str, Any]]) -> Tensor:
    chosen = torch.cat([logps_of(model, pair)[0] for pair in pairs])
    mean = -chosen.sum() / lengths_of(pairs)[:, 0].sum()
    return mean_of("sigmoid")(model, reference, pairs) + SFT_WEIGHT * mean


def of_all_pairs(model: nn.Module, reference: nn.Module, pairs: list[dict[str, Any]]) -> Tensor:
    own = [torch.cat(logps) for logps in zip(*(logps_of(model, p) for p in pairs), strict=True)]
    with torch.no_grad():
        other = zip(*(logps_of(reference, pair) for pair in pairs), strict=True)
        refs = [torch.cat(logps) for logps in other]
    return aot(*own, *refs, lengths_of(pairs)).mean()


def of_answers(model: nn.Module, reference: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    prompts = [row["prompt_ids"] for row in rows]
    sources = mismatched_rows([prompts.index(prompt) for prompt in prompts])

    def logratio(prompt: list[int], answer: list[int]) -> Tensor:
        with torch.no_grad():
            other = answer_logps(reference, prompt, answer)
        return answer_logps(model, prompt, answer) - other

    with torch.no_grad():
        others = [rows[source]["completion_ids"] for source in sources]
        z = torch.stack([logratio(*each) for each in zip(prompts, others, strict=True)]).mean()
    assert z > 0.01, "it would be clamped"
    losses = []
    for row in rows:
        distance = logratio(row["prompt_ids"], row["completion_ids"]) - z
        losses.append(torch.sigmoid(-BETA * (distance if row["label"] else -distance)))
    return torch.stack(losses).mean()


def weighted_pairs() -> Dataset:
    pairs = pairs_of(ROWS).add_column("weight", [1.0, 0.5, 0.0, 3.0, 1.5, 2.0])
    return pairs.add_column("label_confidence", [0.9, 0.6, 1.0, 0.75, 0.8, 0.95])


KINDS = {
    "separable": Kind({"loss_type": "sigmoid"}, mean_of("sigmoid")),
    "length-normalised": Kind({"loss_type": "ipo"}, mean_of("ipo")),
    "token-mean": Kind(
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, SFT_WEIGHT]}, with_sft
    ),
    "two-phase": Kind({"loss_type": "aot", "label_smoothing": 0.1}, of_all_pairs),
    "reference-free": Kind(
        {"loss_type": "simpo"}, mean_of("simpo", has_reference=False), has_reference=False
    ),
    "unpaired": Kind({"loss_type": "kto"}, of_answers, lambda: answer_rows(ROWS)),
    "weighted": Kind({"loss_type": "sigmoid"}, mean_of("sigmoid"), weighted_pairs),
}


def models() -> tuple[nn.Module, nn.Module]:
    """Policy and reference, which differ."""
    return tiny_llama().double(), tiny_llama(seed=1).double()


def textbook_step(kind: Kind) -> tuple[float, dict[str, Tensor]]:
    """The loss of the first step, and the gradient of each parameter."""
    with float64_throughout():
        policy, reference = models()
        loss = kind.mean_loss(policy.train(), reference.eval(), list(kind.rows()))
        loss.backward()
    return loss.item(), {name: p.grad for name, p in policy.named_parameters()}


def trained_step(folder: Path, kind: Kind, **options: Any) -> tuple[float, dict[str, Tensor]]:
    """The same of a trainer, on any number of ranks; gradients from the change of the weights."""
    options = {
        "gradient_accumulation_steps": 1,
        "layout": "shared",
        "learning_rate": RATE,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "optim": "sgd",
        **kind.options,
        **options,
    }
    with float64_throughout():
        policy, reference = models()
        before = {name: p.detach().clone() for name, p in policy.named_parameters()}
        given = {"options": options, "ref_model": reference if kind.has_reference else None}
        make = make_kto if "completion_ids" in kind.rows().column_names else make_trainer
        trainer = make(folder, policy, kind.rows(), **given)
        trainer.train()
    after = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    return trainer.first_loss, {
        name: (old - after[name].detach()) / RATE for name, old in before.items()
    }


def assert_same_step(
    found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]
) -> None:
    """Compare losses and all gradients."""
    assert abs(found[0] - expected[0]) <= 1e-10
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert found[1][name].dtype == torch.float64
        assert (found[1][name] - gradient).abs().max() <= 1e-10, name
    assert max(gradient.abs().max() for gradient in expected[1].values()) > 1e-2
