"""Twenty steps of a small Llama on real pairs, in packed rows, equal textbook DPO."""

from __future__ import annotations

import pytest

from dpofast.data.packing.plan import BatchShape, StepSampler
from tests.real_pairs import (
    NUM_PAIRS,
    OPTIONS,
    assert_is_plain_dpo,
    checkpoint,
    race_model,
    real_pairs,
    real_tokenizer,
    two_threads,
)
from tests.support import history, make_trainer, train

pytestmark = pytest.mark.slow  # textbook DPO runs one sequence at a time through two models


@pytest.fixture(autouse=True)
def threads():
    with two_threads():
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return real_tokenizer()


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return real_pairs(tokenizer)


def make(folder, tokenizer, pairs, **options):
    return make_trainer(
        folder,
        race_model(tokenizer),
        pairs,
        options=OPTIONS | options,
        processing_class=tokenizer,
    )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_twenty_steps_are_those_of_plain_dpo(tmp_path, tokenizer, pairs, plain_history, layout):
    whole = train(make(tmp_path, tokenizer, pairs, layout=layout))
    assert_is_plain_dpo(layout, whole, plain_history)
    if layout == "shared":
        resumed = make(tmp_path, tokenizer, pairs, layout=layout)
        resumed.train(resume_from_checkpoint=checkpoint(tmp_path / "run"))
        assert_is_plain_dpo("resumed in mid-epoch", history(resumed), plain_history)


def test_rows_hold_what_the_plan_counts(tmp_path, tokenizer, pairs):
    """Count the tokens that reach the body and the positions that reach the head."""
    trainer = make(tmp_path, tokenizer, pairs, max_steps=3, save_strategy="no")
    body_tokens, head_rows = [], []
    trainer.score_datasets()  # score now: the hooks below must not count these passes
    trainer.model.model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: body_tokens.append(inputs[0].numel())
    )
    trainer.model.lm_head.register_forward_hook(
        lambda _, inputs, __: head_rows.append(len(inputs[0]))
    )
    trainer.train()
    limit = trainer.train_set().token_limit
    shape = BatchShape(2, 2, 1)
    sampler = StepSampler(NUM_PAIRS, shape, 0, seed=3, limit=limit)
    rows = [row for step in list(sampler)[:3] for row in step.micro_batches]
    # Earlier calls belong to the check that runs before step 1.
    assert body_tokens[-len(rows) :] == [sum(limit.lengths[pair] for pair in row) for row in rows]
    answers = [
        len(pairs[i]["chosen_ids"]) + len(pairs[i]["rejected_ids"]) for i in range(NUM_PAIRS)
    ]
    assert head_rows[-len(rows) :] == [sum(answers[pair] for pair in row) for row in rows]
