"""Packed training of a small Llama on real pairs against textbook DPO, twenty optimizer steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.data import find_data, race_tokenizer
from dpofast.data import load_preferences, tokenize_preferences
from dpofast.data.plan import BatchShape, StepSampler
from tests.support import PlainDPO, make_trainer, race_model, train

pytestmark = pytest.mark.slow  # textbook DPO runs every sequence alone, through two models

STEPS = 20
PAIRS_PER_STEP = 4
NUM_PAIRS = 78  # the last step of the epoch has two
BETA, LEARNING_RATE = 0.1, 2e-4


@pytest.fixture(autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return race_tokenizer(find_data("dpo_en_demo")[0])


@pytest.fixture(scope="module")
def pairs(tokenizer):
    data = load_preferences(str(find_data("dpo_en_demo")[0]))
    tokenised, _ = tokenize_preferences(data, tokenizer, max_length=1024)
    columns = tokenised.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    return columns.select(range(NUM_PAIRS))


@pytest.fixture(scope="module")
def plain(tokenizer, pairs):
    history = PlainDPO(race_model(tokenizer), BETA, LEARNING_RATE).train(
        pairs, PAIRS_PER_STEP, STEPS, seed=3
    )
    losses = [loss for loss, _ in history]
    assert max(abs(loss / math.log(2) - 1) for loss in losses) > 0.05
    return history


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_twenty_steps_are_those_of_plain_dpo(tmp_path, tokenizer, pairs, plain, layout):
    options = {
        "layout": layout,
        "max_steps": STEPS,
        "max_length": 1024,
        "beta": BETA,
        "learning_rate": LEARNING_RATE,
        "max_tokens_per_microbatch": 2048,
    }
    trainer = make_trainer(
        tmp_path, race_model(tokenizer), pairs, options=options, processing_class=tokenizer
    )
    got = train(trainer)
    worst = np.abs(np.asarray(got) / np.asarray(plain) - 1.0).max(0)
    print(
        f"{layout}: worst relative difference of the loss {worst[0]:.1e}, the norm {worst[1]:.1e}"
    )
    assert (worst <= 1e-5).all()


def test_rows_hold_what_the_plan_counts(tmp_path, tokenizer, pairs):
    """Tokens of the body and rows of the head, counted as they reach the modules."""
    options = {"max_steps": 3, "max_length": 1024, "max_tokens_per_microbatch": 2048}
    trainer = make_trainer(
        tmp_path, race_model(tokenizer), pairs, options=options, processing_class=tokenizer
    )
    body_tokens, head_rows = [], []
    trainer._score_references()  # these passes are counted by nobody
    trainer.model.model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: body_tokens.append(inputs[0].numel())
    )
    trainer.model.lm_head.register_forward_hook(
        lambda _, inputs, __: head_rows.append(len(inputs[0]))
    )
    trainer.train()
    limit = trainer.loaders.token_limit(trainer.train_dataset)
    shape = BatchShape(2, 2, 1)
    sampler = StepSampler(NUM_PAIRS, shape, 0, seed=3, limit=limit)
    rows = [row for step in list(sampler)[:3] for row in step.micro_batches]
    # the last call but these is the check before step 1
    assert body_tokens[-len(rows) :] == [sum(limit.lengths[pair] for pair in row) for row in rows]
    answers = [
        len(pairs[i]["chosen_ids"]) + len(pairs[i]["rejected_ids"]) for i in range(NUM_PAIRS)
    ]
    assert head_rows[-len(rows) :] == [sum(answers[pair] for pair in row) for row in rows]
