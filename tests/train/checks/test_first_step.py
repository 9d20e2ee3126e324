"""A run whose first step trains nothing stops, and a run whose first step rightly does goes on."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from dpofast import DPOTrainer
from dpofast.errors import ModelError
from dpofast.train.checks.first_step import FirstStep
from dpofast_kernels import make_loss
from tests.support import history, make_trainer, tiny_llama, token_pairs, train


def only_embedding(model):
    model.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    return model


def cut_off(model):
    """Make the gradient of everything below the head 0, as bitsandbytes' inference kernels do."""
    model.model.norm.register_forward_hook(lambda _m, _i, output: output.detach() + 0 * output)
    return model


def test_a_gradient_of_exactly_zero_stops_the_run(tmp_path):
    with pytest.raises(ModelError, match="gradient norm of the first step is exactly 0"):
        make_trainer(tmp_path, cut_off(only_embedding(tiny_llama()))).train()


def test_also_in_a_resumed_run_and_without_clipping(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.0}
    model = only_embedding(tiny_llama())
    make_trainer(tmp_path, model, options={**options, "max_steps": 3}).train()
    trainer = make_trainer(tmp_path, cut_off(only_embedding(tiny_llama())), options=options)
    with pytest.raises(ModelError, match="gradient norm of the first step is exactly 0"):
        trainer.train(resume_from_checkpoint=True)


def test_weights_that_do_not_move_stop_the_run(tmp_path):
    model, other = tiny_llama(), tiny_llama()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ModelError, match=r"No trained parameter has changed.*learning rate 0\.1"):
        make_trainer(tmp_path, model, optimizers=(optimizer, None)).train()


def test_updates_that_bfloat16_rounds_away_stop_the_run(tmp_path):
    model = tiny_llama().bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_().clamp_(min=0.01)
    options = {"learning_rate": 1e-9}
    with pytest.raises(ModelError, match="bfloat16, which rounds such small updates away"):
        make_trainer(tmp_path, model, options=options).train()
    # While the rate rises, a step may be too small.
    rising = {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "warmup_steps": 5}
    assert len(train(make_trainer(tmp_path, tiny_llama().bfloat16(), options=rising))) == 6


def test_a_learning_rate_of_zero_moves_nothing_and_is_no_error(tmp_path):
    options = {"lr_scheduler_type": "linear", "warmup_steps": 2}
    trainer = make_trainer(tmp_path, options=options)
    assert len(train(trainer)) == 6  # the first step of a warm-up has a rate of 0
    assert trainer.first_step is None
    trainer = make_trainer(tmp_path, options={"learning_rate": 0.0})
    assert len(train(trainer)) == 6
    assert trainer.first_step is not None  # no step could be judged


def test_after_a_warm_up_the_weights_must_move(tmp_path):
    other = tiny_llama(1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 2, 1.0))
    trainer = make_trainer(tmp_path, optimizers=(optimizer, scheduler))
    with pytest.raises(ModelError, match="No trained parameter"):
        trainer.train()
    assert trainer.state.global_step == 3


def test_hinge_beyond_its_margin_has_no_gradient_and_is_no_error(tmp_path):
    pairs = token_pairs(10)
    far = [{**row, "ref_chosen_logps": -1e4, "ref_rejected_logps": -1.0} for row in pairs]
    options = {"loss_type": "hinge"}
    steps = train(make_trainer(tmp_path, pairs=type(pairs).from_list(far), options=options))
    assert {norm for _, norm in steps} == {0.0}


def test_a_step_that_the_loss_scaler_skips_is_passed_over():
    from dpofast.train.checks.first_step import FirstStep

    class Output:
        logps, pair_weights = torch.zeros(2, dtype=torch.float64), None

    class Batch:
        num_pairs, ref_logps = 1, torch.zeros(2, dtype=torch.float64)
        lengths = torch.tensor([[2, 3]])
        weights = label_confidence = coefficients = None

    from dpofast_kernels import make_loss

    model = torch.nn.Linear(2, 2)
    check = FirstStep(model, make_loss("sigmoid", 0.1))
    for was_skipped in (True, False):
        check.begin([{"lr": 0.1}])
        check.add(Output(), Batch())
        assert check.has_slope
        if not was_skipped:
            model.weight.data.add_(1.0)
        norm = float("inf") if was_skipped else 1.0
        assert check.finish(norm, was_skipped, lambda vector: vector) is not was_skipped


def test_a_check_costs_nothing_after_the_first_step(tmp_path):
    seen = []

    class Looks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(trainer.first_step is not None)

    trainer = make_trainer(tmp_path, callbacks=[Looks()])
    trainer.train()
    assert seen == [True] + [False] * 5
    assert len(history(trainer)) == 6


def test_a_loss_of_a_subclass_is_not_judged(tmp_path):
    class Still(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 0.0 * self.model.lm_head.weight.double().sum()

    trainer = make_trainer(tmp_path, tiny_llama(), trainer_class=Still)
    assert all(norm == 0.0 for _, norm in train(trainer))
    assert trainer.first_step is None


def test_a_resumed_run_may_begin_with_a_step_too_small_to_move_anything():
    """A schedule that ends may have brought the rate close to 0 where the run goes on."""

    def judge(is_fresh):
        step = FirstStep(tiny_llama(), make_loss("sigmoid"), is_fresh=is_fresh)
        step.begin([{"lr": 1e-12}])
        step.has_slope = True
        return step.finish(1.0, was_skipped=False, sum_over_ranks=lambda facts: facts)

    assert judge(is_fresh=False)
    with pytest.raises(ModelError, match="No trained parameter has changed"):
        judge(is_fresh=True)
