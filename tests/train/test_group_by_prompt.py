"""Runs whose steps have all pairs of their prompts: compared with textbook DPO on these steps."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from dpofast.data import mix_preferences
from dpofast.data.packing.prompt_order import PromptOrder
from dpofast.errors import CheckpointError, ConfigError
from dpofast.monitor.card import CARD_FILE
from dpofast.train.data.training_set import total_steps
from dpofast_kernels import make_loss
from tests.coupled import logistic
from tests.grouped import SIZES, grouped_pairs
from tests.kernels.preference.formulas import plain_formula
from tests.support import (
    BETA,
    PlainDPO,
    answer_logps,
    clip_exactly,
    history,
    make_trainer,
    tiny_llama,
    token_pairs,
    train,
)
from tests.train.data.stream_runs import stream_of
from tests.train.data.test_pooled import paired_rows, ranked_rows

GROUPED = {"group_by_prompt": True, "learning_rate": 5e-4}
STEPS_PER_EPOCH = 5  # four of at least 4 pairs, and one of the other 3 of the 28 pairs


def of_pairs(name):
    loss = make_loss(name, BETA)
    return lambda a, b, lengths: plain_formula(loss, a, b, lengths)


def aot(chosen, rejected, ref_chosen, ref_rejected, lengths):
    better, worse = (chosen - rejected).sort()[0], (ref_chosen - ref_rejected).sort()[0]
    return logistic(BETA * (better - worse))


def by_ratios(formula):
    return lambda c, r, ref_c, ref_r, lengths: formula(c - ref_c, r - ref_r, lengths)


CASES = {
    "sigmoid": ({"loss_type": "sigmoid"}, by_ratios(of_pairs("sigmoid"))),
    "ipo": ({"loss_type": "ipo"}, by_ratios(of_pairs("ipo"))),
    "sigmoid_norm": ({"loss_type": "sigmoid_norm"}, by_ratios(of_pairs("sigmoid_norm"))),
    "mixture": (
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
        by_ratios(
            lambda a, b, n: 0.8 * of_pairs("sigmoid")(a, b, n) + 0.2 * of_pairs("bco_pair")(a, b, n)
        ),
    ),
    "aot": ({"loss_type": "aot"}, aot),
}


class PlainSteps(PlainDPO):
    """Two models, one sequence at a time, and the mean over a step's pairs of any loss of them.

    Args:
        formula: (chosen, rejected, ref_chosen, ref_rejected [P], lengths [P, 2]) -> losses [P].
    """

    def __init__(self, formula, reference=None):
        super().__init__(tiny_llama(), BETA, GROUPED["learning_rate"])
        self.formula, self.reference = formula, reference or self.reference

    def step(self, pairs):
        self.model.train()
        sides = ("chosen_ids", "rejected_ids")
        logps = [self._logps(self.model, pairs, side) for side in sides]
        with torch.no_grad():
            logps += [self._logps(self.reference, pairs, side) for side in sides]
        lengths = torch.tensor([[len(pair[side]) for side in sides] for pair in pairs])
        loss = self.formula(*logps, lengths).sum() / len(pairs)
        loss.backward()
        norm = clip_exactly(self.model.parameters(), self.max_norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm

    @staticmethod
    def _logps(model, pairs, side):
        return torch.stack([answer_logps(model, pair["prompt_ids"], pair[side]) for pair in pairs])


def steps_of(pairs, epochs):
    """The pairs of each step: tests/data/packing/test_prompt_order.py holds the rules."""
    prompts = [tuple(ids) for ids in pairs["prompt_ids"]]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    order = PromptOrder(np.array([numbers[prompt] for prompt in prompts]), 4, 3)
    return [[pairs[i] for i in step] for epoch in range(epochs) for step in order.steps(epoch)]


@pytest.mark.slow  # the textbook loop runs a hundred pairs, one sequence at a time
@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_in_float32_are_those_of_plain_dpo(tmp_path, case, layout):
    named, formula = CASES[case]
    # With answers of one length and another reference, aot compares log-probs of different pairs.
    pairs = grouped_pairs(lengths=(8, 8))
    steps = steps_of(pairs, 5)[:20]
    assert len({len(step) for step in steps}) > 2, "steps of several sizes"
    plain = PlainSteps(formula, tiny_llama(seed=1))
    expected = [plain.step(step) for step in steps]
    options = {**GROUPED, **named, "layout": layout, "max_tokens_per_microbatch": 60}
    trainer = make_trainer(
        *(tmp_path, None, pairs),
        options={**options, "max_steps": len(steps)},
        ref_model=tiny_llama(seed=1),
    )
    got = train(trainer)
    assert abs(expected[-1][0] / expected[0][0] - 1) > 0.05, "it learns"
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    if case == "aot":
        by_pair = PlainSteps(CASES["sigmoid"][1], tiny_llama(seed=1)).step(steps[0])[0]
        assert abs(by_pair / expected[0][0] - 1) > 1e-4


def test_three_steps_are_those_of_plain_dpo(tmp_path):
    """A quick part of the test above."""
    pairs = grouped_pairs()
    plain = PlainSteps(CASES["sigmoid"][1])
    expected = [plain.step(step) for step in steps_of(pairs, 1)[:3]]
    options = {**GROUPED, "max_steps": 3}
    got = train(make_trainer(tmp_path, pairs=pairs, options=options))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    ((logged, _),) = train(
        make_trainer(tmp_path, pairs=pairs, options={**options, "logging_steps": 3})
    )
    sizes = [len(step) for step in steps_of(pairs, 1)[:3]]
    mean = np.average([loss for loss, _ in got], weights=sizes)
    assert logged == pytest.approx(mean, rel=1e-6), "a mean over pairs, not over steps"


def test_without_a_repeated_prompt_it_changes_nothing(tmp_path):
    pairs = token_pairs(10)
    assert len({tuple(ids) for ids in pairs["prompt_ids"]}) == 10
    expected = train(make_trainer(tmp_path / "plain", pairs=pairs))
    options = {"group_by_prompt": True}
    assert train(make_trainer(tmp_path / "grouped", pairs=pairs, options=options)) == expected


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_resumed_in_mid_epoch_is_the_same_run(tmp_path, workers):
    """Resume within the second epoch, from a checkpoint between two logs."""
    pairs = grouped_pairs()
    options = {**GROUPED, "max_steps": 14, "save_strategy": "steps", "save_steps": 3}
    options |= {"logging_steps": 2, "lr_scheduler_type": "linear"}
    straight = make_trainer(tmp_path, pairs=pairs, options=options)
    expected = train(straight)
    resumed = make_trainer(
        tmp_path, pairs=pairs, options={**options, "dataloader_num_workers": workers}
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
    assert history(resumed) == expected
    assert resumed.pairs_trained == straight.pairs_trained
    steps = steps_of(pairs, 3)
    assert straight.pairs_trained == sum(map(len, steps[:14]))
    assert resumed.pairs_before == sum(map(len, steps[:9]))
    for ours, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("before", [False, True])
def test_it_can_change_on_a_resume_only_if_that_is_allowed(tmp_path, before):
    pairs, options = grouped_pairs(), {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tmp_path, pairs=pairs, options={**options, "group_by_prompt": before}).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    options["group_by_prompt"] = not before
    with pytest.raises(CheckpointError, match=f"group_by_prompt: {before} in .*, {not before} now"):
        make_trainer(tmp_path, pairs=pairs, options=options).train(checkpoint)
    options["allow_changed"] = "group_by_prompt"
    trainer = make_trainer(tmp_path, pairs=pairs, options=options)
    trainer.train(checkpoint)
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({"num_train_epochs": 2, "max_steps": -1}, 10, 2),
        ({"num_train_epochs": 0.5, "max_steps": -1}, 3, 0.6),
        ({"max_steps": 8}, 8, 1.6),
        ({"num_train_epochs": 1, "max_steps": -1, "dataloader_drop_last": True}, 4, 1),
    ],
)
def test_the_schedule_follows_the_planned_steps(tmp_path, options, steps, epochs):
    pairs = grouped_pairs()
    given = {**GROUPED, **options, "lr_scheduler_type": "linear", "warmup_ratio": 0.2}
    trainer = make_trainer(tmp_path, pairs=pairs, options=given)
    assert total_steps(trainer.args, trainer.train_set()) == steps
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert [log["step"] for log in logs] == list(range(1, steps + 1))
    assert logs[-1]["epoch"] == pytest.approx(epochs, abs=1e-3)
    rates = [log["learning_rate"] for log in logs]
    warmup = -(-steps // 5)
    factors = [
        step / warmup if step < warmup else (steps - step) / (steps - warmup)
        for step in range(steps)
    ]
    np.testing.assert_allclose(rates, np.array(factors) * GROUPED["learning_rate"], atol=1e-9)
    sizes = list(map(len, steps_of(pairs, 2)))
    if options.get("dataloader_drop_last"):
        del sizes[4]
    assert trainer.pairs_trained == sum(sizes[:steps])


def test_reports_say_how_large_steps_are(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        options = {**GROUPED, "max_steps": STEPS_PER_EPOCH}
        trainer = make_trainer(tmp_path, pairs=grouped_pairs(), options=options)
        trainer.train()
    sizes = list(map(len, steps_of(grouped_pairs(), 1)))
    smallest, largest = min(sizes[:-1]), max(sizes[:-1])
    assert (
        f"group_by_prompt: 28 pairs of 10 prompts, at most 6 of one, in 5 steps of {smallest} to "
        f"{largest} pairs; the last of an epoch, with {sizes[-1]} pairs, is smaller." in caplog.text
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["pairs_per_step"] == 4
    assert summary["group_by_prompt"] == {
        "prompts": 10,
        "largest_group": 6,
        "steps": 5,
        "smallest_step": smallest,
        "largest_step": largest,
        "last_step": sizes[-1],
    }
    assert summary["pairs_trained"] == sum(sizes) == sum(SIZES)
    assert trainer.get_total_train_batch_size(trainer.args) == 6  # the mean is 5.6
    trainer.create_model_card()
    card = (tmp_path / "run" / CARD_FILE).read_text()
    assert "| pairs per step | 4 or more, with all pairs of a prompt |" in card
    plain = make_trainer(tmp_path / "plain", pairs=grouped_pairs(), options={"max_steps": 1})
    plain.train()
    assert plain.get_total_train_batch_size(plain.args) == 4
    summary = json.loads((tmp_path / "plain" / "run" / "summary.json").read_text())
    assert summary["group_by_prompt"] is None


def test_a_prompt_of_several_datasets_is_one(tmp_path):
    pairs = grouped_pairs()
    mixture = mix_preferences({"a": pairs.select(range(12)), "b": pairs.select(range(12, 28))})
    trainer = make_trainer(tmp_path, pairs=mixture, options=GROUPED)
    trainer.train()
    plan, tokenised = trainer.train_set().plan, trainer.train_set().pairs
    assert len(plan) == STEPS_PER_EPOCH
    found = [
        {tuple(tokenised[pair]["prompt_ids"]) for row in step.micro_batches for pair in row}
        for step in plan
    ]
    assert sum(map(len, found)) == len(SIZES) == len(set.union(*found))


def test_rows_with_many_answers_have_the_steps_of_their_pairs(tmp_path):
    rows = ranked_rows()
    ranked = make_trainer(tmp_path, pairs=rows, options=GROUPED)
    plain = make_trainer(tmp_path, pairs=paired_rows(rows), options=GROUPED)
    np.testing.assert_allclose(train(ranked), train(plain), rtol=1e-6)
    plan, number = ranked.train_set().plan, ranked.train_set().prompts()
    assert len(plan) == 6  # each row makes five pairs, which are a step of at least four
    for step in plan:
        assert len({number[pair] for row in step.micro_batches for pair in row}) == 1


def test_an_evaluation_is_the_same(tmp_path):
    held_out = grouped_pairs((3, 2, 1, 3), seed=8)
    found = [
        make_trainer(
            tmp_path / str(grouped),
            eval_dataset=held_out,
            options={"group_by_prompt": grouped},
            ref_model=tiny_llama(seed=1),
        ).evaluate()
        for grouped in (False, True)
    ]
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert found[0][name] == found[1][name]


def test_a_stream_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="group_by_prompt: train is a stream"):
        make_trainer(tmp_path, pairs=stream_of(grouped_pairs().to_list()), options=GROUPED)


def test_too_few_pairs_for_a_step_are_named(tmp_path):
    options = {**GROUPED, "dataloader_drop_last": True}
    trainer = make_trainer(tmp_path, pairs=grouped_pairs((2, 1)), options=options)
    with pytest.raises(ConfigError, match="3 examples don't fill one step of 4"):
        trainer.train()
