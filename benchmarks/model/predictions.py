"""The predicted cases: heads with their floor, how each assumption moves them, and whole steps."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.head import TOKENS_PER_PAIR
from benchmarks.head_cases import Case, bounds_of
from benchmarks.model.assumptions import Assumptions, ranges, sources
from benchmarks.model.head import CAPPED, DESIGNS, TODAY, Prediction, Size, floor_seconds, predict
from benchmarks.model.step import Body, predict_body

TOKENS = (4096, 8192, 32768)
# A smaller change of the worst ratio is not listed.
SMALLEST_CHANGE = 5e-4


@dataclass(frozen=True)
class HeadCase:
    """A head with the rows of its pairs, and what is predicted for it.

    Attributes:
        name: name of the head.
        size: H and V.
        num_rows: N.
        floor: seconds of the bare products.
        predictions: by the name of the design.
    """

    name: str
    size: Size
    num_rows: int
    floor: float
    predictions: dict[str, Prediction]

    @property
    def over_floor(self) -> float:
        """Predicted time of today's design over that of the bare products."""
        return self.predictions[TODAY.name].total / self.floor

    def as_dict(self) -> dict[str, Any]:
        """The case as it is written to JSON; all times in seconds."""
        found = {
            name: {**asdict(each), "total": each.total, "over_floor": each.total / self.floor}
            for name, each in self.predictions.items()
        }
        return {
            "name": self.name,
            "N": self.num_rows,
            "H": self.size.hidden,
            "V": self.size.vocab,
            "floor": self.floor,
            "designs": found,
        }


@dataclass(frozen=True)
class StepCase:
    """A packed row of a step: its body, and the head's part of it.

    Attributes:
        checkpointing, fused: see `predict_body`.
        body: the row's forward and backward without the head.
        head: the head on the row's scored tokens.
        optimizer: seconds of the optimizer, once a step.
    """

    checkpointing: bool
    fused: bool
    body: Body
    head: Prediction
    optimizer: float

    @property
    def row(self) -> float:
        """Seconds of the row's forward and backward."""
        return self.body.seconds + self.head.total

    def as_dict(self) -> dict[str, Any]:
        """The case as it is written to JSON; all times in seconds."""
        return {
            "checkpointing": self.checkpointing,
            "fused": self.fused,
            "tokens": self.body.tokens,
            "pairs": len(self.body.lengths) // 2,
            "scored": sum(self.body.lengths),
            "row": self.row,
            "optimizer": self.optimizer,
            "launches": self.body.launches + self.head.launches,
            "body": {kind: asdict(work) for kind, work in self.body.work.items()},
            "head": {**asdict(self.head), "total": self.head.total},
        }


@functools.cache
def answer_lengths(num_rows: int) -> tuple[int, ...]:
    """[2P] scored tokens of the answers of `benchmarks.head` on a GPU."""
    pairs = max(1, num_rows // TOKENS_PER_PAIR)
    bounds = bounds_of(Case("", num_rows, 1, 1, pairs, "bfloat16", even=False))
    return tuple(int(rows) for rows in bounds.diff())


def head_cases(
    heads: dict[str, Size], tokens: Iterable[int], assumed: Assumptions
) -> list[HeadCase]:
    """Predict every head with every number of rows."""
    return [
        HeadCase(
            name,
            size,
            num_rows,
            floor_seconds(num_rows, size, assumed),
            {each.name: predict(each, size, answer_lengths(num_rows), assumed) for each in DESIGNS},
        )
        for name, size in heads.items()
        for num_rows in tokens
    ]


def capped_over_floor(
    heads: dict[str, Size], num_rows: int, assumed: Assumptions
) -> dict[str, dict[str, float]]:
    """The time of each head with a soft cap over that of its bare products, by back end."""
    lengths = answer_lengths(num_rows)
    return {
        name: {
            each.name: predict(each, size, lengths, assumed).total
            / floor_seconds(num_rows, size, assumed)
            for each in CAPPED
        }
        for name, size in heads.items()
    }


def worst_over_floor(heads: dict[str, Size], tokens: Iterable[int], assumed: Assumptions) -> float:
    """The largest ratio of today's design to the bare products."""
    return max(
        predict(TODAY, size, answer_lengths(num_rows), assumed).total
        / floor_seconds(num_rows, size, assumed)
        for num_rows in tokens
        for size in heads.values()
    )


def sensitivity(
    heads: dict[str, Size], tokens: Sequence[int], assumed: Assumptions
) -> dict[str, dict[str, Any]]:
    """For each assumption that matters: its range, and the worst ratio at both ends of it."""
    middle = worst_over_floor(heads, tokens, assumed)
    found = {}
    for name, ends in ranges(assumed).items():
        if ends[0] == ends[1]:
            continue
        at_ends = [worst_over_floor(heads, tokens, replace(assumed, **{name: end})) for end in ends]
        if max(abs(each - middle) for each in at_ends) >= SMALLEST_CHANGE:
            found[name] = {
                "value": getattr(assumed, name),
                "range": list(ends),
                "head_over_floor": at_ends,
                "source": sources()[name],
            }
    return found


def step_cases(shape: str, max_tokens: int, assumed: Assumptions) -> list[StepCase]:
    """A row with and without checkpointing, with stock and with fused layers."""
    found = []
    for fused in (False, True):
        for checkpointing in (True, False):
            body = predict_body(
                shape, max_tokens, assumed, checkpointing=checkpointing, fused=fused
            )
            head = predict(TODAY, Size(body.hidden, body.vocab), body.lengths, assumed)
            optimizer = body.optimizer_seconds(assumed)
            found.append(StepCase(checkpointing, fused, body, head, optimizer))
    return found
