"""The demo's questions and their splits."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from dpofast.demo.data import DemoData, make_data, save_rows
from dpofast.demo.model import make_tokenizer
from dpofast.demo.tasks import Row, capitals, lists, sums


@pytest.fixture(scope="module", params=[0, 1])
def data(request: pytest.FixtureRequest) -> DemoData:
    return make_data(request.param)


def texts(rows: list[Row], side: str) -> list[str]:
    return [row[side][0]["content"] for row in rows]


def num_tokens(rows: list[Row], side: str) -> list[int]:
    tokenizer = make_tokenizer()
    return [len(ids) for ids in tokenizer(texts(rows, side))["input_ids"]]


def test_held_out_prompts_occur_nowhere_else(data: DemoData) -> None:
    held_out = set(texts(data.held_out, "prompt"))
    assert len(held_out) == len(data.held_out)
    assert not held_out & set(texts(data.train, "prompt"))
    assert not held_out & {prompt for prompt, _ in data.warmup}


def test_there_are_a_few_hundred_pairs(data: DemoData) -> None:
    assert 300 <= len(data.train) <= 600
    assert len(set(texts(data.train, "prompt"))) == len(data.train)


def test_half_of_the_held_out_pairs_are_equally_long(data: DemoData) -> None:
    lengths = zip(
        num_tokens(data.held_out, "chosen"), num_tokens(data.held_out, "rejected"), strict=True
    )
    equal = [chosen == rejected for chosen, rejected in lengths]
    assert sum(equal) == len(data.held_out) / 2


def test_rejected_answers_are_wrong_or_longer(data: DemoData) -> None:
    for row in data.train + data.held_out:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen != rejected
        assert len(chosen) == len(rejected) or (chosen in rejected and len(rejected) > len(chosen))


def test_the_warm_up_prefers_no_kind_of_answer(data: DemoData) -> None:
    answers: dict[str, list[str]] = {}
    for prompt, answer in data.warmup:
        answers.setdefault(prompt, []).append(answer)
    assert {len(found) for found in answers.values()} == {3}
    assert all(len(set(found)) == 3 for found in answers.values())


def test_the_seed_decides(data: DemoData) -> None:
    assert make_data(0) == make_data(0)
    assert make_data(0) != make_data(1)


def test_right_is_right_and_wrong_as_long() -> None:
    rng = random.Random(0)
    questions = [*capitals(rng), *sums(rng), *islice(lists(rng), 200)]
    for question in questions:
        assert len(question.right) == len(question.wrong)
        assert question.right != question.wrong
        assert question.right in question.wordy
    for question in sums(rng):
        numbers = [
            int(word)
            for word in question.prompt.replace("?", " ").replace(".", " ").split()
            if word.isdigit()
        ]
        assert sum(numbers) == int(question.right)


def test_saved_rows_are_read_back(data: DemoData, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    save_rows(data.held_out, path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == data.held_out
