"""Long packed rows of real pairs, on several threads: short rows would hide some mistakes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from benchmarks.data import REAL, find_data, race_tokenizer
from dpofast.data import load_preferences, tokenize_preferences
from dpofast.data.packing.batch import TokenIds
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.prompt_groups import PromptGroups
from dpofast.data.packing.token_limit import token_limit
from tests.exactness import assert_alike, case_of, compare, laid_out, separate
from tests.support import PlainDPO, float64_throughout, make_trainer, tiny_llama, train

VOCAB_SIZE = 1_999
BETA = 0.02  # small: answers this long would saturate the loss and leave no gradient


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fewer_ids(pair: dict[str, list[int]]) -> dict[str, list[int]]:
    """Map ids into a small vocabulary, for a cheaper head; lengths and common starts stay."""
    return {name: [token % VOCAB_SIZE for token in ids] for name, ids in pair.items()}


def tokenised(name: str) -> tuple[Dataset, Any]:
    """All pairs of a preference file, not truncated, and the tokenizer."""
    path = find_data(name)[0]
    tokenizer = race_tokenizer(path)
    pairs, _ = tokenize_preferences(load_preferences(path), tokenizer, max_length=None)
    return pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]), tokenizer


@pytest.fixture(scope="module")
def conversations():
    return tokenised("dpo_en_demo")


@pytest.fixture(scope="module")
def instructions():
    return tokenised("instruction_preference")


def sequences(pairs: Dataset) -> list[tuple[TokenIds, TokenIds]]:
    sides = ("chosen_ids", "rejected_ids")
    return [(pair["prompt_ids"], pair[side]) for pair in pairs for side in sides]


def llama():
    """A Llama in float64 with weights large enough for every part to matter."""
    model = tiny_llama(vocab_size=VOCAB_SIZE, max_position_embeddings=8192)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.12)
    return model.double()


@pytest.mark.parametrize("count", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_conversations_equal_separate_sequences(conversations, count):
    pairs, _ = conversations
    case = case_of(
        sequences(pairs.select(range(count)).map(fewer_ids)), BETA, per_token=-math.log(VOCAB_SIZE)
    )
    assert sum(len(prompt) + len(answer) for prompt, answer in case.sequences) > 1_000 * count
    model = llama()
    with float64_throughout():
        expected = separate(model, case)
        torch.set_num_threads(2)  # one thread would hide racing writes to the same position
        assert_alike(laid_out(model, case, Layout("shared")), expected)


def common_start(first: Sequence[object], second: Sequence[object]) -> int:
    """Tokens or characters that both begin with, counted without the code under test."""
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


def test_what_answers_begin_with_is_saved_as_counting_says(instructions):
    pairs = instructions[0]
    columns = [pairs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    rows = list(zip(*columns, strict=True))
    begun = sum(common_start(chosen, rejected) for _, chosen, rejected in rows)
    answers = sum(len(chosen) + len(rejected) for _, chosen, rejected in rows)
    prompts = sum(len(prompt) for prompt, *_ in rows)
    assert begun > 0.08 * answers
    groups = PromptGroups.of(pairs)
    shared, unshared = (token_limit(groups, Layout(n), 2048) for n in ("shared", "unshared"))
    assert sum(shared.lengths) == prompts + answers - begun
    assert sum(shared.plain) == sum(unshared.lengths) == 2 * prompts + answers


def test_the_real_answers_begin_alike_in_an_eighth_of_their_text():
    path, source = find_data("instruction_preference")
    if source != REAL:
        pytest.skip("instruction_preference.json isn't here; set DPOFAST_DATA to its folder")
    rows = json.loads(path.read_text())  # includes the six with identical answers
    begun = sum(common_start(row["chosen"], row["rejected"]) for row in rows)
    whole = sum(len(row["chosen"]) + len(row["rejected"]) for row in rows)
    assert begun / whole == pytest.approx(0.126, abs=0.001)


def alike_pairs(pairs: Dataset, count: int) -> Dataset:
    """Pairs whose answers begin alike; in some, one answer is a prefix of the other."""
    alike = [p for p in pairs if common_start(p["chosen_ids"], p["rejected_ids"]) > 3][:count]
    for index, pair in enumerate(alike[::2]):
        kept, cut = ("chosen_ids", "rejected_ids")[:: 1 if index % 2 else -1]
        pair[cut] = pair[kept][: len(pair[kept]) // 2 + index % 3]
    return Dataset.from_list(alike).map(fewer_ids)


def test_answers_that_begin_alike_equal_separate_sequences(instructions):
    alike = alike_pairs(instructions[0], 12)
    case = case_of(sequences(alike), 0.1, per_token=-math.log(VOCAB_SIZE))
    compare(llama(), case, Layout("shared"))


def test_answers_that_begin_alike_train_as_plain_dpo(tmp_path, instructions):
    pairs, tokenizer = instructions
    alike = alike_pairs(pairs, 10)
    fields = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 512}
    with float64_throughout():
        plain = PlainDPO(tiny_llama(**fields).double(), 0.5, 5e-3)
        expected = plain.train(alike, 4, 6, seed=3)
        options = {"layout": "shared", "max_tokens_per_microbatch": 150}
        model = tiny_llama(**fields).double()
        arguments = {"options": options, "processing_class": tokenizer}
        trainer = make_trainer(tmp_path, model, alike, **arguments)
        got = train(trainer)
    assert abs(expected[-1][0] / math.log(2) - 1) > 0.05
    np.testing.assert_allclose([x[0] for x in got], [x[0] for x in expected], atol=1e-9, rtol=0)
    np.testing.assert_allclose([x[1] for x in got], [x[1] for x in expected], rtol=1e-8)
