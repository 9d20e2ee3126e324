"""Each loss that TRL has under the same name trains as with TRL's DPOTrainer, step by step."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from benchmarks.train_cases import SHAPES
from benchmarks.train_contenders import token_trainer
from dpofast import DPOConfig, DPOTrainer
from dpofast.options.metric_fields import TOKEN_METRICS
from dpofast_kernels import COUPLED_LOSSES, LOSSES, make_loss
from tests.support import byte_tokenizer, clip_exactly, naive_margin, tiny_llama, token_pairs

trl = pytest.importorskip("trl", reason="needs the extra `bench`")

pytestmark = [pytest.mark.peer, pytest.mark.slow]  # imports TRL

STEPS, PAIRS_PER_STEP = 10, 4
OPTIONS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "adam_epsilon": 1e-4,  # with less, Adam blows the rounding of tiny gradients up
    "beta": 0.5,
    "max_length": None,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 11,
}
CASES = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid_norm", "beta": 5.0},
    {"loss_type": "hinge"},
    {"loss_type": "ipo"},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    {"loss_type": "apo_zero"},
    {"loss_type": "apo_down"},
    {"loss_type": "nca_pair", "beta": 1.0},
    {"loss_type": "bco_pair"},
    {"loss_type": "sppo_hard"},
    {"loss_type": "discopop", "learning_rate": 3e-4},  # its slopes grow as exp(-z)
    {"loss_type": "discopop", "discopop_tau": 0.5},
    {"loss_type": "aot"},
    {"loss_type": "aot", "label_smoothing": 0.1},
    {"loss_type": "aot_unpaired"},
    {"loss_type": ["aot_unpaired", "ipo"], "loss_weights": [1.0, 0.1]},
    {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
    {"loss_type": ["ipo", "hinge", "exo_pair"], "label_smoothing": 0.1},
    {"loss_type": "sft"},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},  # Llama 3.1
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},  # MPO
    {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
    {"loss_type": "ipo", "f_divergence_type": "forward_kl"},
    {"loss_type": "sigmoid_norm", "beta": 5.0, "f_divergence_type": "alpha_divergence"},
    {
        "loss_type": ["sigmoid", "hinge"],
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.2,
    },
    {"loss_type": "sigmoid", "ld_alpha": 0.5},
    {"loss_type": "ipo", "ld_alpha": 0.0},
    {"loss_type": ["sigmoid_norm", "apo_zero"], "beta": 5.0, "ld_alpha": 0.3},
    {"loss_type": "sigmoid", "use_weighting": True},
    {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2], "use_weighting": True},
    {"loss_type": "ipo", "use_weighting": True, "ld_alpha": 0.5},
]


class TokenTrainer(token_trainer()):
    """TRL's trainer with a gradient norm that loses no digits on a CPU."""

    def _clip_grad_norm(self, model):
        return clip_exactly(model.parameters(), self.args.max_grad_norm)


def logs_of(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "grad_norm" in log]


def race_llama():
    """A model of the shape that the race has."""
    return tiny_llama(**SHAPES["race"][1])


def both(folder, pairs, options, model=None, ref_model=None):
    """Logs of each step: TRL's and ours."""
    model, options = model or race_llama(), {**OPTIONS, **options}
    given = {"train_dataset": pairs, "processing_class": byte_tokenizer()}
    theirs = TokenTrainer(
        copy.deepcopy(model),
        ref_model=copy.deepcopy(model if ref_model is None else ref_model),
        args=trl.DPOConfig(output_dir=str(folder / "trl"), **options),
        **given,
    )
    args = DPOConfig(
        output_dir=str(folder / "ours"),
        reference_store=str(folder / "store"),
        metrics=list(TOKEN_METRICS),
        **options,
    )
    ours = DPOTrainer(copy.deepcopy(model), ref_model=ref_model, args=args, **given)
    return logs_of(theirs), logs_of(ours)


def column(logs, name):
    return [log[name] for log in logs]


@pytest.mark.parametrize("options", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_losses_gradient_norms_and_rewards_are_trls(tmp_path, options):
    options = {**options, "max_steps": STEPS, "per_device_train_batch_size": PAIRS_PER_STEP}
    # The likelihood of random tokens falls only if the same ones come again.
    num_pairs = PAIRS_PER_STEP if "sft" in options["loss_type"] else STEPS * PAIRS_PER_STEP
    theirs, ours = both(tmp_path, token_pairs(num_pairs), options)
    assert len(ours) == len(theirs) == STEPS
    losses = column(theirs, "loss")
    assert max(abs(loss / losses[0] - 1) for loss in losses) > 0.05, losses
    for name in ("loss", "grad_norm"):
        expected = column(theirs, name)
        np.testing.assert_allclose(column(ours, name), expected, rtol=1e-4, err_msg=name)
    for name in TOKEN_METRICS:
        expected = column(theirs, name)
        np.testing.assert_allclose(column(ours, name), expected, 1e-4, 1e-5, err_msg=name)
    if options["loss_type"] == "sft":
        assert max(column(ours, "mean_token_accuracy")) > 0.0
        return  # ours has no reference, and TRL's rewards have one
    for name in (
        *("rewards/chosen", "rewards/rejected", "rewards/margins"),
        *("logps/chosen", "logps/rejected"),
    ):
        expected = column(theirs, name)
        np.testing.assert_allclose(column(ours, name), expected, atol=1e-3, rtol=0, err_msg=name)


def test_every_loss_of_trl_is_compared():
    single = {case["loss_type"] for case in CASES if isinstance(case["loss_type"], str)}
    with_reference = {name for name, loss in LOSSES.items() if not loss.reference_free}
    expected = {*with_reference, *COUPLED_LOSSES, "sft"} - {"dpop"}  # TRL has no dpop
    assert single == expected


def test_label_smoothing_of_sigmoid_has_no_effect_in_trl(tmp_path):
    """TRL ignores it, so only the formula can say what the loss is. One pair is a step."""
    options = {"max_steps": 5, "per_device_train_batch_size": 1, "label_smoothing": 0.2}
    theirs, ours = both(tmp_path, token_pairs(5), options)
    margins = np.asarray(column(theirs, "rewards/margins"))
    np.testing.assert_allclose(column(theirs, "loss"), np.logaddexp(0, -margins), rtol=1e-5)
    margins = np.asarray(column(ours, "rewards/margins"))
    expected = 0.8 * np.logaddexp(0, -margins) + 0.2 * np.logaddexp(0, margins)
    np.testing.assert_allclose(column(ours, "loss"), expected, rtol=1e-5)


def test_weights_of_a_mixture_with_sft_fail_in_trl(tmp_path):
    """They work here: tests/train/test_wpo.py has the formula."""
    options = {"loss_type": ["sigmoid", "sft"], "use_weighting": True, "max_steps": 1}
    with pytest.raises(RuntimeError, match="unsupported operation"):
        both(tmp_path, token_pairs(2), {**options, "per_device_train_batch_size": 2})


def test_discopop_is_nan_in_trl_where_the_margin_is_below_minus_88(tmp_path):
    """There exp(-z) is infinite in float32, and its factor 0; our loss is that of the formula."""
    reference = tiny_llama(seed=1)
    pairs = token_pairs(1)
    pair, beta = pairs[0], 1000.0
    margin = beta * naive_margin(tiny_llama(), reference, pair).item()
    if margin > 0:
        pairs = pairs.rename_columns({"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"})
        margin = -margin
    assert margin < -88
    options = {"loss_type": "discopop", "beta": beta, "max_steps": 1}
    theirs, ours = both(
        *(tmp_path, pairs, {**options, "per_device_train_batch_size": 1}),
        model=tiny_llama(),
        ref_model=reference,
    )
    assert math.isnan(theirs[0]["loss"])
    zero, lengths = torch.zeros(1).double(), torch.ones(1, 2)
    logratio = torch.tensor([ours[0]["rewards/margins"] / beta]).double()
    expected = make_loss("discopop", beta=beta).pair_loss(logratio, zero, lengths)[0].item()
    assert ours[0]["rewards/margins"] == pytest.approx(margin, rel=1e-4)
    assert ours[0]["loss"] == pytest.approx(expected, rel=1e-5) == pytest.approx(-margin, rel=1e-4)
    assert math.isfinite(ours[0]["grad_norm"])
