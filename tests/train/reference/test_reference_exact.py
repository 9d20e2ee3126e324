"""Training on stored log-probs equals training that scores the reference in every step, in fp32.

Both are equal to the last bit if the builder scores the training plan's micro-batches, and up to
rounding if it makes its own batches.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from dpofast.model.forward import micro_batch, run_batch
from dpofast.model.head import ScoreTask, head_options
from dpofast.model.scorer import SequenceScorer
from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.batches import Batch
from dpofast.reference.build.builder import BuildOptions, build_reference
from dpofast.reference.store.store import ReferenceStore
from dpofast.train.data.sampler import train_sampler
from tests.real_pairs import (
    OPTIONS,
    STEPS,
    TOLERANCE,
    race_model,
    real_pairs,
    real_tokenizer,
    two_threads,
)
from tests.support import make_trainer, tiny_llama, token_pairs, train

OWN_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class InStep:
    """Scores every micro-batch with a copy of the model, made before training."""

    def __init__(self, trainer):
        self.frozen = copy.deepcopy(trainer.model).eval()
        self.compute = trainer.compute_pair_loss

    def compute_pair_loss(self, model, batch, sums):
        assert (batch.ref_logps == -1.0).all()  # the placeholder of `scored_in_each_step`
        return self.compute(model, replace(batch, ref_logps=self.logps(batch)), sums)

    def logps(self, batch):
        config = self.frozen.config
        with torch.no_grad(), micro_batch(self.frozen, batch):
            task = ScoreTask(batch.labels, head_options(config))
            per_token_logps = run_batch(self.frozen, batch, task).double().numpy()  # [N]
        bounds = batch.bounds.tolist()
        sums = [per_token_logps[a:b].sum() for a, b in pairwise(bounds)]
        return torch.tensor(sums, dtype=torch.float64)


def scored_in_each_step(make, pairs):
    """Train without a store: (loss, gradient norm) of every step."""
    for column in OWN_COLUMNS:
        pairs = pairs.add_column(column, [-1.0] * len(pairs))
    trainer = make("in-step", pairs)
    trainer.compute_pair_loss = InStep(trainer).compute_pair_loss
    return train(trainer)


def micro_batches_of(trainer):
    """A function that gives the builder the micro-batches of the training plan."""
    train_set = trainer.train_set()
    train_set.measure_lengths(trainer.layout, trainer.loaders.row_tokens)
    sampler = train_sampler(trainer.args, len(train_set), train_set.token_limit)

    def batches(_, wanted):
        rows = [row for step in sampler for row in step.micro_batches]
        assert len(wanted) in (0, 2 * sum(map(len, rows)))
        answers = [[2 * pair + side for pair in row for side in (0, 1)] for row in rows]
        return [Batch(np.array(each), len(each)) for each in answers] if len(wanted) else []

    return batches


def on_stored_rows(make, pairs, own_batches=False):
    """Train with all rows in the store: (loss, gradient norm) of every step."""
    trainer = make("stored", pairs)
    if own_batches:
        trainer.score_datasets()
    else:
        trainer.loaders.settle()
        identity = trainer.reference.identity
        folder = trainer.args.reference_folder()
        build_reference(
            ReferenceStore.open(folder, create=True).namespace(identity),
            read_answers(trainer.train_dataset),
            SequenceScorer(trainer.model, trainer.accelerator.autocast, trainer.layout),
            batches=micro_batches_of(trainer),
            options=BuildOptions(progress=False),
        )
    reader = make("reader", pairs)
    got = train(reader)
    report = reader.reference.store.reports["train"]
    assert (report.rows_found, report.rows_scored) == (2 * len(pairs), 0)
    return got


@pytest.mark.parametrize("layout", ["shared", "unshared", "padded"])
def test_rows_of_the_plans_micro_batches_train_bit_for_bit_as_scored_in_each_step(tmp_path, layout):
    def make(name, pairs):
        options = {
            "layout": layout,
            "max_tokens_per_microbatch": 60,
            "output_dir": str(tmp_path / name),
        }
        return make_trainer(tmp_path, tiny_llama(), pairs, options=options)

    pairs = token_pairs(24)
    assert on_stored_rows(make, pairs) == scored_in_each_step(make, pairs)


@pytest.mark.slow  # trains three times on real pairs
@pytest.mark.timeout(1200)
def test_twenty_steps_on_real_pairs(tmp_path):
    tokenizer = real_tokenizer()
    pairs = real_pairs(tokenizer)

    def make(name, given, store="plan"):
        options = {
            **OPTIONS,
            "save_strategy": "no",
            "output_dir": str(tmp_path / name),
            "reference_store": str(tmp_path / store),
        }
        model = race_model(tokenizer)
        return make_trainer(tmp_path, model, given, options=options, processing_class=tokenizer)

    with two_threads():
        expected = scored_in_each_step(make, pairs)
        assert on_stored_rows(make, pairs) == expected
        own = on_stored_rows(lambda *given: make(*given, store="own"), pairs, own_batches=True)
    expected = np.array(expected)  # [20, 2]
    assert len(expected) == STEPS
    assert np.abs(expected[:, 0] / np.log(2) - 1.0).max() > 0.05  # it learns
    worst = np.abs(np.array(own) / expected - 1.0).max(0)
    print(f"own batches: worst relative difference of loss {worst[0]:.1e}, norm {worst[1]:.1e}")
    assert (worst <= TOLERANCE).all()
