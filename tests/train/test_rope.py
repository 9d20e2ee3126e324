"""Runs of models whose RoPE depends on lengths equal plain DPO that runs each sequence alone."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from dpofast.errors import MissingRowsError
from dpofast.model.scorer import SequenceScorer
from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.batches import BatchesOfAnswers
from dpofast.reference.build.builder import BuildOptions, build_reference
from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.reference.identity.model import ROPE_ENTRY
from dpofast.reference.store.store import ReferenceStore
from dpofast.train.checkpoint.run_state import STATE_FILE
from tests.rope import KINDS, forgetful, rope_parameters
from tests.support import (
    BETA,
    VOCAB_SIZE,
    PlainDPO,
    answer_logps,
    history,
    make_trainer,
    tiny_llama,
    train,
)

LENGTH = 14  # the model's original length
STEPS = 20
LEARNING_RATE = 5e-4  # large enough to move the loss, and too small to bring it near 0


def stretched_llama(kind, seed=0):
    rope = rope_parameters(kind, frequencies=4, length=LENGTH)
    return tiny_llama(seed, max_position_embeddings=LENGTH, rope_parameters=rope)


def mixed_pairs(num_pairs=12):
    """Every third pair is longer than the original length, and one has an answer on either side."""
    rng = random.Random(4)

    def ids(count):
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(count)]

    rows = []
    for index in range(num_pairs):
        prompt = ids(rng.randint(2, 6))
        counts = [rng.randint(30, 40), rng.randint(20, 30)] if index % 3 == 0 else [5, 7]
        if index == 1:
            counts = [LENGTH - len(prompt), LENGTH + 9]
        chosen, rejected = map(ids, counts)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return Dataset.from_list(rows)


def plain_dpo(model, pairs, order, steps=STEPS):
    """(loss, gradient norm) of each step of textbook DPO, every sequence alone."""
    plain = PlainDPO(copy.deepcopy(model), BETA, LEARNING_RATE)
    with forgetful(plain.model), forgetful(plain.reference):
        if order == "random":
            return plain.train(pairs, 4, steps, seed=3)
        starts = [4 * step % len(pairs) for step in range(steps)]
        return [plain.step([pairs[start + i] for i in range(4)]) for start in starts]


def assert_close(found, expected):
    for column, name in enumerate(("loss", "gradient norm")):
        wanted = [step[column] for step in expected]
        assert [step[column] for step in found] == pytest.approx(wanted, rel=1e-5), name


@pytest.mark.parametrize(
    ("order", "checkpointing"),
    [("random", True), pytest.param("sequential", False, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_twenty_steps_equal_plain_dpo(tmp_path, kind, order, checkpointing):
    model, pairs = stretched_llama(kind), mixed_pairs()
    expected = plain_dpo(model, pairs, order)
    options = {
        **{"max_steps": STEPS, "train_sampling_strategy": order},
        **{"learning_rate": LEARNING_RATE, "gradient_checkpointing": checkpointing},
    }
    trainer = make_trainer(tmp_path, model, pairs, options=options)
    found = train(trainer)
    assert trainer.layout.name == "padded"
    assert found[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert min(loss for loss, _ in found) < 0.95 * found[0][0]
    assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_as_in_plain_dpo(tmp_path, kind):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(
        tmp_path,
        stretched_llama(kind),
        mixed_pairs(),
        options={"max_steps": 6, "learning_rate": LEARNING_RATE},
        peft_config=lora,
    )
    expected = plain_dpo(trainer.model, mixed_pairs(), "random", steps=6)
    assert_close(train(trainer), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_policy_has_the_loss_ln_2_in_every_step_and_evaluation(tmp_path, kind):
    options = {
        **{"learning_rate": 0.0, "max_steps": 9, "beta": 1.0},
        **{"eval_strategy": "steps", "eval_steps": 3},
    }
    trainer = make_trainer(
        tmp_path, stretched_llama(kind), mixed_pairs(), options=options, eval_dataset=mixed_pairs(7)
    )
    losses = [loss for loss, _ in train(trainer)]
    losses += [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(losses) == 12
    assert losses == pytest.approx([math.log(2)] * 12, abs=1e-5)
    # Long sequences change neither the model nor its config, so its identity remains as well.
    again = make_trainer(tmp_path, trainer.model, mixed_pairs())
    assert again.reference.settle() == trainer.reference.identity


@pytest.mark.parametrize("kind", KINDS)
def test_stored_rows_are_those_of_each_sequence_alone_whatever_shared_its_batch(tmp_path, kind):
    """The last policy's RoPE is of another type than the reference's, and its rows are packed."""
    histories = []
    for batch_size, policy in ((1, kind), (4, kind), (4, "default")):
        trainer = make_trainer(
            tmp_path,
            stretched_llama(kind) if policy == kind else tiny_llama(),
            mixed_pairs(),
            ref_model=stretched_llama(kind, seed=5),
            options={
                **{"max_steps": 3, "precompute_ref_batch_size": 3},
                "per_device_train_batch_size": batch_size,
                "gradient_accumulation_steps": 4 // batch_size,
            },
        )
        histories.append(train(trainer))
        report = trainer.reference.store.totals()
        assert report.rows_scored == (24 if len(histories) == 1 else 0)
    assert trainer.layout.name == "shared"
    assert_close(histories[1], histories[0])
    stored = trainer.train_set().ref_logps
    reference = stretched_llama(kind, seed=5)
    with torch.no_grad(), forgetful(reference):
        for row, logps in zip(mixed_pairs(), stored, strict=True):
            answers = (row["chosen_ids"], row["rejected_ids"])
            alone = [
                answer_logps(reference, row["prompt_ids"], answer).item() for answer in answers
            ]
            assert logps == pytest.approx(alone, rel=1e-6)


def older(identity):
    """The identity that earlier versions gave to the same reference."""
    description = {k: v for k, v in identity.description.items() if k not in ROPE_ENTRY}
    return ReferenceIdentity.of(description)


@pytest.mark.parametrize("kind", [*KINDS, "default"])
def test_rows_of_earlier_versions_are_read_only_for_other_models(tmp_path, kind):
    model = tiny_llama() if kind == "default" else stretched_llama(kind)
    trainer = make_trainer(tmp_path, model, mixed_pairs(), options={"max_steps": 1})
    identity = trainer.reference.settle()
    scorer = SequenceScorer(model, trainer.accelerator.autocast, trainer.layout)
    build_reference(
        ReferenceStore.open(tmp_path / "store", create=True).namespace(older(identity)),
        read_answers(trainer.train_dataset),
        scorer,
        batches=BatchesOfAnswers(24, scorer.num_tokens),
        options=BuildOptions(progress=False),
    )
    trainer.train()
    report = trainer.reference.store.totals()
    if kind == "default":
        assert identity == older(identity)
        assert (report.rows_found, report.rows_scored) == (24, 0)
    else:
        assert identity.digest != older(identity).digest
        assert (report.rows_found, report.rows_scored) == (0, 24)


def test_a_checkpoint_of_an_earlier_version_goes_on_with_rows_scored_again(tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2, "verify_checkpoint": False}

    def make(model):
        return make_trainer(tmp_path, model, mixed_pairs(), options=options)

    trainer = make(stretched_llama("dynamic"))
    expected = train(trainer)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    state = json.loads((checkpoint / STATE_FILE).read_text())
    before = older(trainer.reference.identity)
    state["reference_digest"] = before.digest
    state["reference_description"] = before.description
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    shutil.rmtree(tmp_path / "store")
    resumed = make(stretched_llama("dynamic"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert history(resumed) == expected
    assert resumed.reference.store.totals().rows_scored == 24
    lines = [r.message for r in caplog.records if "that depended on their batch" in r.message]
    assert len(lines) == 1
    # A policy that has moved can't score them.
    shutil.rmtree(tmp_path / "store")
    moved = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(MissingRowsError, match="before step 1"):
        make(moved).train(resume_from_checkpoint=str(checkpoint))
