"""What is known of a NaN or an infinity in a step, and the error that says it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dpofast.data.packing.batch import PackedPairs, StepBatch
from dpofast.model.pair_losses import batch_losses
from dpofast.model.scored_answers import ScoredAnswers
from dpofast.train.checkpoint.resume import newest_whole
from dpofast_kernels import CoupledLoss, PreferenceLoss

# Pairs and tensors that a message names; it counts the others.
NAMED_PAIRS, NAMED_TENSORS = 8, 3


@dataclass(frozen=True)
class Pass:
    """What is kept of a micro-batch until its step is known to be finite, all on its device.

    Attributes:
        batch: the micro-batch.
        loss: [], its mean loss.
        logps: [2P] fp64, the log-probs of its answers; None if a subclass has another loss.
        pair_weights: [P] fp64, WPO's weights of its pairs; None without.
    """

    batch: PackedPairs
    loss: Tensor
    logps: Tensor | None
    pair_weights: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """[]: NaN or infinite if the loss or a log-prob is; a bounded loss hides the latter."""
        return self.loss if self.logps is None else self.loss + self.logps.sum().to(self.loss)


@dataclass
class StepPasses:
    """The passes of a step on this rank.

    Attributes:
        step: the step; None before the first one.
        passes: one for each micro-batch that has been run, in the order of the step.
    """

    step: StepBatch | None = None
    passes: list[Pass] = field(default_factory=list)

    def is_bad(self, device: torch.device) -> Tensor:
        """[] bool: whether a loss or a log-prob is NaN or infinite."""
        if not self.passes:
            return torch.zeros((), dtype=torch.bool, device=device)
        return torch.stack([each.total for each in self.passes]).isfinite().all().logical_not()

    def bad_pairs(self, loss: PreferenceLoss) -> list[int]:
        """The pairs whose loss is NaN or infinite, as the step counts them.

        If each pair's own loss is finite, and their sum or a term beside it isn't, all pairs of the
        micro-batch are returned.
        """
        if self.step is None:
            return []
        found: list[int] = []
        for indices, each in zip(self.step.indices, self.passes, strict=False):
            if not bool(each.total.isfinite()) and len(indices) == each.batch.num_pairs:
                flags = _bad_pairs(each, loss)
                found += [index for index, is_bad in zip(indices, flags, strict=True) if is_bad]
        return found


@dataclass(frozen=True)
class Facts:
    """What one rank knows of a step that isn't finite.

    Attributes:
        rank: the rank.
        is_loss: whether its part of the loss isn't finite.
        rows: rows of its pairs whose loss isn't finite, counted from 0.
        source: what the rows are counted in.
        weights: names of trained weights that aren't finite.
        gradients: names of weights whose gradient isn't finite.
        last: a sentence about the checkpoint to go on from; that of rank 0 counts.
    """

    rank: int
    is_loss: bool
    rows: tuple[int, ...]
    source: str
    weights: tuple[str, ...]
    gradients: tuple[str, ...]
    last: str


def step_message(step: int, norm: Any, facts: Sequence[Facts]) -> str:
    """The message about a step whose loss or gradient norm isn't finite.

    Args:
        step: number of the step, from 1.
        norm: gradient norm before clipping; None if it isn't known.
        facts: what each rank knows.
    """
    weights = distinct(each.weights for each in facts)
    gradients = distinct(each.gradients for each in facts)
    parts = [f"Step {step}: {_what(norm, facts, gradients)}."]
    if weights:
        parts.append(
            f"{names_in_words(weights)} {have(weights)} NaN or infinite elements, so an update "
            "before this step has broken the model: lower learning_rate, raise warmup_steps, or "
            "set max_grad_norm."
        )
    elif any(each.rows for each in facts):
        parts.append(
            "The trained weights are finite, so look at these rows and at what computes their "
            "loss. If all rows of the step are there, the weights may have grown too large: lower "
            "learning_rate. float16 overflows where bfloat16 doesn't (bf16: true)."
        )
    else:
        parts.append(
            "The trained weights are finite, so look at learning_rate and at the precision; "
            "float16 overflows where bfloat16 doesn't (bf16: true)."
        )
    parts.append(f"The run ends here, and this step isn't saved. {facts[0].last}")
    return " ".join(parts)


def saving_message(what: str, names: Sequence[str], last: str, step: int) -> str:
    """The message about tensors that are about to be saved and aren't finite.

    Args:
        what: what isn't written, as the subject of a sentence.
        names: names of the tensors.
        last: a sentence about the checkpoint to go on from.
        step: steps that the run has done.
    """
    return (
        f"{what} isn't saved, as {names_in_words(names)} {have(names)} NaN or infinite elements "
        f"after step {step}: lower learning_rate, raise warmup_steps, or set max_grad_norm. "
        f"{last}"
    )


def last_checkpoint(output_dir: str, run_id: str | None) -> str:
    """A sentence about the run's checkpoint to go on from, which isn't read for it."""
    found, _ = newest_whole(output_dir, run_id, verify=False)
    if found is None:
        return f"There is no checkpoint in {output_dir} to go on from."
    return f"The last whole checkpoint is {found}: resume_from_checkpoint goes on from there."


def _what(norm: Any, facts: Sequence[Facts], gradients: Sequence[str]) -> str:
    """What isn't finite: pairs, else the loss as a whole, else gradients."""
    on_ranks = [(each, f" on rank {each.rank}" if len(facts) > 1 else "") for each in facts]
    rows = [
        f"{rows_in_words(each.rows)} of {each.source}{where}"
        for each, where in on_ranks
        if each.rows
    ]
    if rows:
        return f"the loss is NaN or infinite at {' and '.join(rows)}, counted from 0"
    places = [where for each, where in on_ranks if each.is_loss]
    if places:
        return f"the loss is NaN or infinite{' and'.join(places)}"
    if gradients:
        named = names_in_words(gradients)
        return f"the loss is finite, but the gradient of {named} is NaN or infinite"
    return f"the loss is finite, but the gradient norm is {float(norm)}"


def rows_in_words(rows: Sequence[int]) -> str:
    """The first numbers of rows, and the number of the others."""
    numbers = _listed(list(map(str, sorted(rows))), NAMED_PAIRS)
    return f"row {numbers}" if len(rows) == 1 else f"rows {numbers}"


def names_in_words(names: Sequence[str]) -> str:
    """The first names of tensors, and the number of the others."""
    return _listed(names, NAMED_TENSORS)


def have(names: Sequence[str]) -> str:
    """The verb for these names."""
    return "has" if len(names) == 1 else "have"


def _listed(items: Sequence[str], limit: int) -> str:
    shown = ", ".join(items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown


def distinct(lists: Iterable[Iterable[str]]) -> list[str]:
    """The items of all lists, each once, in the order in which they first occur."""
    return list(dict.fromkeys(chain.from_iterable(lists)))


def bad_logps(
    batch: PackedPairs,
    logps: Tensor,  # [2P] or, of single answers, [S]
) -> Tensor:
    """[P] or [S] bool: which pairs or answers have a log-prob that is NaN or infinite.

    Of single answers, that of the mismatched answer counts, too.
    """
    bad = (~logps.isfinite()).view(batch.num_pairs, -1).any(1)
    return bad | ~batch.mismatched_logratios.isfinite() if isinstance(batch, ScoredAnswers) else bad


def z_of(batch: PackedPairs) -> Tensor | None:
    """[]: the z in the loss of every answer of the step, on all ranks; None without."""
    return batch.z if isinstance(batch, ScoredAnswers) else None


def _bad_pairs(each: Pass, loss: PreferenceLoss) -> list[bool]:
    """Whether each pair of a micro-batch isn't finite; all of them if none can be told apart."""
    everything = [True] * each.batch.num_pairs
    if each.logps is None or each.batch.ref_logps is None:
        return everything
    bad = bad_logps(each.batch, each.logps)  # [P]
    z = z_of(each.batch)
    is_bad_z = z is not None and not bool(z.isfinite())
    # A loss that couples pairs spreads a NaN over all of them, and so does z.
    if not is_bad_z and not isinstance(loss, CoupledLoss):
        losses, *_ = batch_losses(loss, each.logps, each.batch, each.pair_weights)
        bad |= ~losses.isfinite()
    flags: list[bool] = bad.tolist()
    return flags if is_bad_z or any(flags) else everything
