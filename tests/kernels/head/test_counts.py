"""Bytes and launches of a call of the head are those of the formulas in docs/kernels.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dpofast_kernels.head import plan_chunks
from dpofast_kernels.head.chunked import ChunkedHead
from tests.kernels.head.counting import count_pair_loss

pytestmark = pytest.mark.slow  # the first operations on the meta device take seconds

DOCS = Path(__file__).parents[3] / "docs" / "kernels.md"


def formula(name: str, **numbers: int) -> int:
    """The value of a formula in the docs, such as `bytes = 6NV + 2VH`."""
    (text,) = re.findall(rf"^ *{name} = (.*)$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    total = 0
    for term in text.split(" + "):
        factor, letters = re.fullmatch(r"(\d*)([A-Z]*)", term).groups()
        value = int(factor or 1)
        for letter in letters:
            value *= numbers[letter]
        total += value
    return total


@pytest.mark.parametrize(
    ("lengths", "upstream", "chunks"),
    [
        ([100, 120, 70, 30], 0.5, 1),  # dW in bf16 at once
        ([100, 120, 70, 30], None, 1),
        ([1500, 1300, 2100, 1900, 900, 700], 0.5, 2),
        ([1500, 1300] * 8, 0.5, 5),
    ],
)
@pytest.mark.parametrize(("vocab_size", "hidden_size"), [(151_936, 896), (256_000, 2304)])
def test_counts_are_those_of_the_docs(
    lengths, upstream, chunks, vocab_size, hidden_size, monkeypatch
):
    plan = plan_chunks(lengths, vocab_size, hidden_size, knows_upstream=upstream is not None)
    numbers = {"N": sum(lengths), "V": vocab_size, "H": hidden_size, "C": len(plan.rows)}
    assert plan.rounds_at_once == (chunks == 1 and upstream is not None)
    found = count_pair_loss(monkeypatch, lengths, vocab_size, hidden_size, upstream)
    assert found.launches["score_tiles"] == found.launches["finish_rows"] == numbers["C"]
    name = "bytes, dW at once" if plan.rounds_at_once else "bytes, dW summed"
    assert sum(found.num_bytes.values()) == formula(name, **numbers)
    assert sum(found.launches.values()) == formula("launches", **numbers)


def test_the_plan_is_that_of_a_call(monkeypatch):
    """plan_chunks has the chunks that the op runs."""
    rows = []
    score = ChunkedHead.score

    def noted(head, part, keep=None):
        rows.append(part.stop - part.start)
        return score(head, part, keep)

    monkeypatch.setattr(ChunkedHead, "score", noted)
    lengths = [900, 600, 300, 1000, 1500, 1300, 2100, 1900, 900, 700, 20, 30]
    count_pair_loss(monkeypatch, lengths, 151_936, 896, 0.5)
    assert tuple(rows) == plan_chunks(lengths, 151_936, 896, torch.bfloat16).rows
