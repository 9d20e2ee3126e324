"""A NaN or an infinity ends a run within its step, and never reaches a file."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from dpofast.errors import DataError, NonFiniteError, ReferenceStoreError
from dpofast.model.finite import non_finite_names
from dpofast.train.finite import step_vote
from dpofast.train.finite.non_finite import Pass, StepPasses
from tests.nan_ways import WAYS, assert_clean, run_way
from tests.support import make_trainer, tiny_llama, token_pairs


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_is_caught_within_its_step(tmp_path, way):
    error = run_way(tmp_path, way)
    expected = WAYS[way]
    assert isinstance(error, expected.error), error
    assert error.exit_code == expected.exit_code
    assert expected.names in str(error)
    assert_clean(tmp_path / "run", expected.last)
    if expected.last:
        assert f"run/checkpoint-{expected.last}" in str(error)


def test_the_weights_are_those_before_the_step(tmp_path):
    trainer = make_trainer(tmp_path, options={"max_grad_norm": 0.0})
    seen = []

    def poisoned(gradient):
        seen.append([p.detach().clone() for p in trainer.model.parameters()])
        return gradient * math.nan

    trainer.model.lm_head.weight.register_hook(poisoned)
    with pytest.raises(NonFiniteError, match=r"gradient of lm_head.weight is NaN"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(seen[0], trainer.model.parameters(), strict=True))


def test_save_model_leaves_an_earlier_export_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save_model(str(tmp_path / "out"))
    files = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 3] = math.inf
    with pytest.raises(NonFiniteError, match=r"lm_head.weight has NaN or infinite"):
        trainer.save_model(str(tmp_path / "out"))
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


class ScaledSGD(torch.optim.SGD):
    """Leaves out steps whose gradients overflow, as the loss scaler of fp16 does."""

    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        if all(grad.isfinite().all() for grad in grads):
            super().step(closure)


@pytest.mark.parametrize(
    ("overflowing", "message"),
    [({0, 1, 3, 4}, None), ({1, 2, 3}, r"Step 4: .*left out 3 steps in a row")],
)
def test_a_loss_scaler_may_leave_out_some_steps(tmp_path, monkeypatch, overflowing, message):
    monkeypatch.setattr(step_vote, "MOST_SKIPPED", 3)
    model = tiny_llama()
    optimizer = ScaledSGD(model.parameters(), lr=0.0)
    trainer = make_trainer(
        tmp_path, model, optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    )

    def overflow(grad):
        trainer.args.fp16 = True  # there is no loss scaler on a CPU
        return grad * math.inf if trainer.state.global_step in overflowing else grad

    model.lm_head.weight.register_hook(overflow)
    with nullcontext() if message is None else pytest.raises(NonFiniteError, match=message):
        trainer.train()


def test_a_poisoned_model_is_not_uploaded(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 3] = math.inf
    trainer.init_hf_repo = lambda *_, **__: None
    with pytest.raises(NonFiniteError, match=r"lm_head.weight has NaN or infinite"):
        trainer.push_to_hub()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_poisoned_optimizer_is_not_saved(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, options=options)
    sums = trainer.accelerator.reduce

    def reduce(*args, **kwargs):
        if trainer.state.global_step == 3:
            for state in trainer.optimizer.state.values():
                state["exp_avg_sq"].fill_(math.inf)  # every later update is 0, and looks healthy
        return sums(*args, **kwargs)

    trainer.accelerator.reduce = reduce
    with pytest.raises(NonFiniteError, match=r"checkpoint-4 isn't saved, as the optimizer's exp_a"):
        trainer.train()
    assert_clean(tmp_path / "run", 2)


def test_a_loss_of_nan_in_evaluation_is_said_and_never_the_best(tmp_path, caplog):
    pairs = token_pairs(6, seed=4)
    options = {
        **{"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        **{"load_best_model_at_end": True, "metric_for_best_model": "loss", "max_steps": 4},
    }

    is_bad = []

    def loss_fn(chosen, rejected, lengths):
        losses = torch.nn.functional.softplus(rejected - chosen)
        return losses - math.inf if is_bad else losses  # -inf is less than any loss

    class FromStep4(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            is_bad.extend([True] * (state.global_step == 4))

    trainer = make_trainer(
        tmp_path, options=options, loss_fn=loss_fn, eval_dataset=pairs, callbacks=[FromStep4()]
    )
    with caplog.at_level(logging.WARNING, logger="dpofast"):
        trainer.train()
    assert trainer.state.best_global_step == 2
    assert "rows 0, 1, 2, 3, 4, 5" in caplog.text
    assert "is never the best" in caplog.text


def test_an_evaluation_of_poisoned_weights_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=token_pairs(4, seed=4))
    trainer.evaluate()
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(NonFiniteError, match=r"lm_head.weight has NaN"):
        trainer.evaluate()


@pytest.mark.parametrize("value", [0.5, math.inf])
def test_reference_log_probs_of_data_are_at_most_0(tmp_path, value):
    pairs = token_pairs(4)
    pairs = pairs.add_column("ref_chosen_logps", [-1.0, -1.0, value, -1.0])
    pairs = pairs.add_column("ref_rejected_logps", [-1.0] * 4)
    with pytest.raises(DataError, match="ref_chosen_logps is"):
        make_trainer(tmp_path, pairs=pairs)


def test_a_scorer_that_returns_more_than_0_is_refused(tmp_path):
    from tests.reference.stubs import write

    rows = {bytes(16): np.array([-1.0, 1e-5, 0.5], np.float32)}
    with pytest.raises(ReferenceStoreError, match=r"0.5 at the answer's token 2, which is above 0"):
        write(tmp_path, rows)
    write(tmp_path, {bytes(16): np.array([-1.0, 1e-5], np.float32)})  # rounding


def test_non_finite_names_sees_every_dtype_and_leaves_out_what_is_empty():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for value in (math.nan, math.inf, -math.inf):
            bad = torch.zeros(3, 4, dtype=dtype)
            bad[2, 1] = value
            good = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
            assert non_finite_names([("good", good), ("bad", bad)]) == ["bad"]
    others = [("empty", torch.empty(0)), ("integers", torch.ones(2, dtype=torch.int64))]
    assert non_finite_names(others) == []


def test_the_bits_of_quantised_weights_are_no_numbers():
    class Params4bit(torch.nn.Parameter):
        """As bitsandbytes stores them with bnb_4bit_quant_storage: bfloat16."""

    bits = torch.full((3,), -1, dtype=torch.int16).view(torch.bfloat16)
    assert bits.isnan().all()
    assert non_finite_names([("bits", Params4bit(bits, requires_grad=False))]) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bounded_loss_hides_no_log_prob_that_is_not_finite(value):
    """apo_zero is 1 and has no slope where a log-prob is minus infinity."""
    logps = torch.tensor([-3.0, -2.0]).double()
    assert not StepPasses(passes=[Pass(None, torch.ones(()), logps)]).is_bad(torch.device("cpu"))
    logps[0] = value
    assert StepPasses(passes=[Pass(None, torch.ones(()), logps)]).is_bad(torch.device("cpu"))
    assert StepPasses(passes=[Pass(None, logps[0], None)]).is_bad(torch.device("cpu"))
