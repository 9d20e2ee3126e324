"""Losses that couple pairs train in two phases, as a textbook loop with all pairs at once does."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from dpofast import CoupledFunction, DPOTrainer
from dpofast.errors import ConfigError
from dpofast.train.steps.coupled import RandomState
from dpofast_kernels import make_coupled_loss, make_loss
from tests.coupled import (
    Doubled,
    aot,
    aot_unpaired,
    first_gradients,
    mixed,
    neighbours,
    of_neighbours,
)
from tests.support import (
    BETA,
    LEARNING_RATE,
    PlainDPO,
    answer_logps,
    clip_exactly,
    float64_throughout,
    history,
    make_trainer,
    tiny_llama,
    tiny_mixtral,
    token_pairs,
    train,
)
from tests.train.data.stream_runs import ROWS, stream_of

CASES = {
    "aot": ({"loss_type": "aot", "label_smoothing": 0.1}, {}, aot),
    "aot_unpaired": ({"loss_type": "aot_unpaired"}, {}, aot_unpaired),
    "mixture": ({"loss_type": ["ipo", "aot_unpaired"], "loss_weights": [0.25, 0.5]}, {}, mixed),
    "function": ({}, {"loss_fn": CoupledFunction(neighbours)}, of_neighbours),
}
SPREADS = {
    "shared": {"layout": "shared"},
    "padded": {"layout": "padded"},
    "several rows": {"layout": "shared", "max_tokens_per_microbatch": 40},
}


class PlainCoupled(PlainDPO):
    """The textbook loop: all pairs of a step in one graph, in the order of the dataset."""

    def __init__(self, formula, *args):
        super().__init__(*args)
        self.formula = formula

    def total(self, pairs):
        columns = []
        for model in (self.model, self.reference):
            for side in ("chosen_ids", "rejected_ids"):
                logps = [answer_logps(model, pair["prompt_ids"], pair[side]) for pair in pairs]
                columns.append(torch.stack(logps))
        columns[2:] = [each.detach() for each in columns[2:]]
        lengths = [[len(pair["chosen_ids"]), len(pair["rejected_ids"])] for pair in pairs]
        return self.formula(*columns, torch.tensor(lengths)).mean()

    def step(self, pairs):
        self.model.train()
        loss = self.total(pairs)
        loss.backward()
        norm = clip_exactly(self.model.parameters(), self.max_norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm


def in_dataset_order(pairs, seed, step, size):
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pairs[index] for index in sorted(order[step * size : (step + 1) * size])]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("case", CASES)
def test_all_gradients_are_those_of_a_textbook_loop(tmp_path, case, spread):
    options, given, formula = CASES[case]
    found, trainer = first_gradients(tmp_path, options | SPREADS[spread], given)
    is_spread = len(trainer.train_set().plan.step(0).micro_batches) > 1
    assert is_spread is (spread != "shared")
    pairs = token_pairs(10)
    with float64_throughout():
        plain = PlainCoupled(formula, tiny_llama().double(), BETA, LEARNING_RATE)
        first = plain.total(in_dataset_order(pairs, 3, 0, 4))
        first.backward()
        with torch.no_grad():
            for parameter in plain.model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
                parameter.grad = None
        second = plain.total(in_dataset_order(pairs, 3, 1, 4))
        second.backward()
    assert history(trainer)[0][0] == pytest.approx(first.item(), abs=1e-12)
    assert history(trainer)[1][0] == pytest.approx(second.item(), abs=1e-10)
    for grad, parameter in zip(found, plain.model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=0, atol=1e-10)
    assert max(grad.abs().max() for grad in found) > 1e-3


@pytest.mark.parametrize("case", ["aot", "function"])
def test_runs_are_those_of_a_textbook_loop(tmp_path, case):
    options, given, formula = CASES[case]
    options = {**options, "max_tokens_per_microbatch": 60}
    with float64_throughout():
        trainer = make_trainer(tmp_path, tiny_llama().double(), options=options, **given)
        found = train(trainer)
        plain = PlainCoupled(formula, tiny_llama().double(), BETA, LEARNING_RATE)
        pairs, expected = token_pairs(10), []
        for epoch in range(2):
            expected += [plain.step(in_dataset_order(pairs, 3 + epoch, i, 4)) for i in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert abs(found[-1][0] / found[0][0] - 1) > 1e-3
    log = trainer.state.log_history[-2]
    assert log["rewards/margins"] == pytest.approx(log["rewards/chosen"] - log["rewards/rejected"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_second_phase_has_the_dropouts_of_the_first(tmp_path, checkpointing):
    options = {
        "loss_type": "aot",
        "disable_dropout": False,
        "gradient_checkpointing": checkpointing,
        "max_tokens_per_microbatch": 40,
        "max_steps": 3,
    }
    runs = []
    for name in ("1", "2"):
        kept, model = Masks(), tiny_llama(attention_dropout=0.3)
        grads, trainer = first_gradients(
            tmp_path / name, options, {}, model, trainer_class=kept.trainer
        )
        assert len(kept.first) == len(kept.second) > 3
        assert all(map(torch.equal, kept.first, kept.second))
        runs.append((grads, history(trainer)))
    assert all(map(torch.equal, runs[0][0], runs[1][0]))
    assert runs[0][1] == runs[1][1]
    assert runs[0][1][0][0] != pytest.approx(np.log(2), rel=1e-3)  # the reference has no dropout


class Masks:
    """Keeps the log-probs of both phases, which show the masks of dropouts."""

    def __init__(self):
        first, second = [], []
        self.first, self.second = first, second

        class Watched(DPOTrainer):
            def coupled_pass(self):
                found = super().coupled_pass()

                class Kept(type(found)):
                    def table(self, batch):
                        table = super().table(batch)
                        first.append(table[:, :2].flatten())
                        return table

                return Kept(**vars(found))

            def compute_pair_loss(self, model, batch, sums):
                output = super().compute_pair_loss(model, batch, sums)
                second.append(output.logps.detach().clone())
                return output

        self.trainer = Watched


def test_numbers_drawn_again_leave_the_later_ones_alone():
    torch.manual_seed(0)
    state = RandomState.now(torch.device("cpu"))
    first = torch.rand(3)
    expected = torch.rand(3)
    torch.manual_seed(0)
    torch.rand(3)
    with state.again():
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3), expected)


def test_the_packing_changes_nothing(tmp_path):
    runs = [
        train(make_trainer(tmp_path / str(tokens), options=options))
        for tokens in (40, 10_000)
        for options in [{"loss_type": "aot_unpaired", "max_tokens_per_microbatch": tokens}]
    ]
    np.testing.assert_allclose(runs[0], runs[1], rtol=2e-4)


def test_the_order_of_the_micro_batches_changes_nothing(tmp_path):
    class Reversed(DPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            batches, indices = inputs.micro_batches[::-1], inputs.indices[::-1]
            inputs = replace(inputs, micro_batches=batches, indices=indices)
            return super().training_step(model, inputs, num_items_in_batch)

    options = {"max_tokens_per_microbatch": 40}
    given = {"loss_fn": CoupledFunction(neighbours)}
    runs = []
    with float64_throughout():
        for kind in (DPOTrainer, Reversed):
            trainer = make_trainer(
                *(tmp_path / kind.__name__, tiny_llama().double()),
                **{"options": options, "trainer_class": kind, **given},
            )
            runs.append(train(trainer))
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-9)


def test_a_resumed_run_goes_on_as_it_was(tmp_path):
    options = {"loss_type": "aot", "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path, options=options)
    expected = train(whole)
    resumed = make_trainer(tmp_path, options=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert history(resumed) == expected


def test_a_stream_trains_as_its_rows_do(tmp_path):
    runs = []
    for name, pairs in (("rows", token_pairs(10)), ("stream", stream_of(ROWS))):
        options = {
            "loss_type": "aot",
            "train_sampling_strategy": "sequential",
            "max_tokens_per_microbatch": 60,
        }
        runs.append(train(make_trainer(tmp_path / name, pairs=pairs, options=options)))
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-6)


def test_the_routers_auxiliary_loss_counts_once(tmp_path):
    logs = []
    # One pair in a step has the sigmoid loss.
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    for name in ("sigmoid", "aot"):
        options = {**single, "loss_type": name, "router_aux_loss_coef": 0.5}
        trainer = make_trainer(tmp_path / name, tiny_mixtral(), options=options)
        logs.append(train(trainer))
        assert "aux_loss" in trainer.state.log_history[0]
    np.testing.assert_allclose(logs[1], logs[0], rtol=1e-5)


def test_an_override_gets_its_part_of_the_coupled_loss(tmp_path):
    options = {"loss_type": "aot", "max_tokens_per_microbatch": 40}
    plain, trainer = first_gradients(tmp_path / "1", {**options, "max_steps": 1}, {})
    found, doubled = first_gradients(
        tmp_path / "2", {**options, "max_steps": 1}, {}, trainer_class=Doubled
    )
    for grad, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(grad, 2 * expected, rtol=1e-12, atol=0)
    assert history(doubled)[0][0] == pytest.approx(2 * history(trainer)[0][0], rel=1e-12)


def test_a_step_can_be_computed_by_hand_but_not_a_part_of_one(tmp_path):
    trainer = make_trainer(tmp_path, options={"loss_type": "aot", "max_tokens_per_microbatch": 40})
    step = next(iter(trainer.get_train_dataloader()))
    assert len(step.micro_batches) > 1
    loss = trainer.compute_loss(trainer.model, step)
    assert loss.item() == pytest.approx(np.log(2), rel=1e-5)
    loss.backward()
    trainer.uncouple()
    with pytest.raises(ConfigError, match=r"^compute_loss: the aot loss couples all pairs"):
        trainer.compute_loss(trainer.model, step.micro_batches[0])
    with pytest.raises(ConfigError, match="the indices of its StepBatch don't say which pairs"):
        trainer.compute_loss(trainer.model, replace(step, indices=()))


def test_weights_that_autocast_has_cast_in_the_first_phase_are_trained(tmp_path):
    """Autocast keeps its casts, which have no gradient if they were made in the first phase."""
    grads = []
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        trainer = make_trainer(tmp_path, options={"loss_type": "aot", "bf16": True})
        step = next(iter(trainer.get_train_dataloader()))
        with context:
            loss = trainer.compute_loss(trainer.model, step)
        loss.backward()
        grads.append([p.grad for p in trainer.model.parameters()])
    assert all(map(torch.equal, *grads))


def test_a_coupled_loss_can_be_assigned_and_taken_back(tmp_path):
    class Assigned(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            name = "sigmoid" if state.global_step % 2 else "aot_unpaired"
            make = make_loss if name == "sigmoid" else make_coupled_loss
            trainer.pair_loss = make(name, beta=BETA)

    trainer = make_trainer(tmp_path / "both", callbacks=[Assigned()], options={"max_steps": 2})
    found = train(trainer)
    assert trainer.loss_types == ["sigmoid"]
    plain = train(make_trainer(tmp_path / "1", options={"loss_type": "aot_unpaired"}))
    assert found[0] == plain[0]
    assert found[1] != plain[1]
