"""Splits the demo's questions into warm-up texts, training pairs and held-out pairs."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from dpofast.demo.tasks import Question, Row, capitals, lists, sums


@dataclass(frozen=True)
class DemoSize:
    """Numbers of pairs to make.

    Attributes:
        facts: training pairs about capitals, and as many again about sums.
        lists: training pairs about lists of animals; they ask for an operation, not for a fact.
        held_out: held-out pairs in each family, an even number.
        warmup_lists: questions about lists that only the warm-up sees.
    """

    facts: int = 128
    lists: int = 256
    held_out: int = 32
    warmup_lists: int = 350


@dataclass(frozen=True)
class DemoData:
    """The demo's three splits; no prompt of `held_out` is in the other two.

    Attributes:
        warmup: (prompt, answer) texts; each question occurs three times, once with each answer.
        train: preference pairs; two in three are right against wrong, one right against wordy.
        held_out: preference pairs; half are right against wrong, half right against wordy.
    """

    warmup: list[tuple[str, str]]
    train: list[Row]
    held_out: list[Row]


def make_data(seed: int, size: DemoSize | None = None) -> DemoData:
    """Generate the demo's data. The same seed gives the same data."""
    size = size or DemoSize()
    rng = random.Random(seed)
    families = {
        "capitals": _shuffled(list(capitals(rng)), rng),
        "sums": _shuffled(list(sums(rng)), rng),
        "lists": _distinct_lists(rng, size.held_out + size.lists + size.warmup_lists),
    }
    counts = {"capitals": size.facts, "sums": size.facts, "lists": size.lists}
    # Training and warm-up use the same questions; the warm-up has some more.
    held_out, train, known = [], [], []
    for name, questions in families.items():
        rest = questions[size.held_out :]
        held_out += questions[: size.held_out]
        train += rest[: counts[name]]
        known += rest
    warmup = [
        (question.prompt, answer)
        for question in known
        for answer in (question.right, question.wrong, question.wordy)
    ]
    rng.shuffle(warmup)
    return DemoData(warmup, _pairs(train, 3, rng), _pairs(held_out, 2, rng))


def save_rows(rows: list[Row], path: Path) -> None:
    """Write rows as JSON lines, and make the folder if it doesn't exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _shuffled(questions: list[Question], rng: random.Random) -> list[Question]:
    rng.shuffle(questions)
    return questions


def _distinct_lists(rng: random.Random, count: int) -> list[Question]:
    """Draw lists until `count` different prompts have come up."""
    by_prompt: dict[str, Question] = {}
    for question in lists(rng):
        by_prompt[question.prompt] = question
        if len(by_prompt) == count:
            return list(by_prompt.values())
    raise AssertionError("lists never end")


def _pairs(questions: list[Question], every: int, rng: random.Random) -> list[Row]:
    """Make one pair of each question; one pair in `every` rejects the wordy answer."""
    rows = [
        question.pair("wordy" if index % every == 0 else "wrong")
        for index, question in enumerate(questions)
    ]
    rng.shuffle(rows)
    return rows
