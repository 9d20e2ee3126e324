"""The same training as TRL's DPOTrainer, step by step, on real pairs."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest

from benchmarks.data import find_data, race_tokenizer
from benchmarks.train_contenders import token_trainer
from dpofast import DPOConfig, DPOTrainer
from dpofast.data import load_preferences, tokenize_preferences
from tests.real_pairs import race_model
from tests.support import clip_exactly

trl = pytest.importorskip("trl", reason="needs the extra `bench`")
peft = pytest.importorskip("peft", reason="needs the extra `peft`")

pytestmark = [pytest.mark.peer, pytest.mark.slow]  # minutes: TRL scores every token on a CPU

STEPS, PAIRS_PER_STEP = 10, 4
OPTIONS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": PAIRS_PER_STEP,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "max_grad_norm": 1.0,
    "max_length": None,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 11,
}


class TokenTrainer(token_trainer()):
    """TRL's trainer with a gradient norm that loses no digits on a CPU."""

    def _clip_grad_norm(self, model):
        return clip_exactly(model.parameters(), self.args.max_grad_norm)


@pytest.fixture(scope="module")
def tokenizer():
    return race_tokenizer(find_data("dpo_en_demo")[0])


@pytest.fixture(scope="module")
def pairs(tokenizer):
    data = load_preferences(str(find_data("dpo_en_demo")[0]))
    tokenised, _ = tokenize_preferences(data, tokenizer, max_length=None)
    columns = tokenised.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    return columns.select(range(STEPS * PAIRS_PER_STEP))


def logs_of(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "grad_norm" in log]


def lora():
    return peft.LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_losses_gradient_norms_and_rewards_are_trls(tmp_path, tokenizer, pairs, peft_config):
    options = {**OPTIONS, "learning_rate": 2e-4} if peft_config else OPTIONS
    model = race_model(tokenizer)
    theirs = logs_of(
        TokenTrainer(
            copy.deepcopy(model),
            ref_model=None if peft_config else copy.deepcopy(model),
            args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), **options),
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=copy.deepcopy(peft_config),
        )
    )
    ours = logs_of(
        DPOTrainer(
            copy.deepcopy(model),
            args=DPOConfig(
                output_dir=str(tmp_path / "ours"),
                reference_store=str(tmp_path / "store"),
                **options,
            ),
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=copy.deepcopy(peft_config),
        )
    )
    losses = [log["loss"] for log in theirs]
    assert max(abs(loss / math.log(2) - 1) for loss in losses) > 0.05, losses
    assert len(ours) == len(theirs) == STEPS
    for name in ("loss", "grad_norm"):
        expected = [log[name] for log in theirs]
        np.testing.assert_allclose([log[name] for log in ours], expected, rtol=1e-4, err_msg=name)
    for name in ("chosen", "rejected", "margins"):
        got, expected = ([log[f"rewards/{name}"] for log in logs] for logs in (ours, theirs))
        np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0, err_msg=name)
    print(json.dumps({"trl": losses, "ours": [log["loss"] for log in ours]}))
