"""Adapters on quantised models train as with TRL's DPOTrainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BitsAndBytesConfig, set_seed

from benchmarks.train_contenders import token_trainer
from dpofast import DPOConfig, DPOTrainer
from tests.quantised import KINDS, adapter, load, save_base
from tests.support import byte_tokenizer, clip_exactly, token_pairs

trl = pytest.importorskip("trl", reason="needs the extra `bench`")
peft = pytest.importorskip("peft", reason="needs the extra `peft`")

pytestmark = [pytest.mark.peer, pytest.mark.slow]  # imports TRL

SEED = 11
OPTIONS = {
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "beta": 0.5,
    "max_length": None,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": SEED,
}


class TokenTrainer(token_trainer()):
    """TRL's trainer with a gradient norm that loses no digits on a CPU."""

    def _clip_grad_norm(self, model):
        return clip_exactly(model.parameters(), self.args.max_grad_norm)


def losses(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "grad_norm" in log]


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_are_trls(tmp_path, kind):
    base = save_base(tmp_path / "base")
    given = {
        "train_dataset": token_pairs(20),
        "processing_class": byte_tokenizer(),
        "peft_config": adapter(),
        "quantization_config": BitsAndBytesConfig(**KINDS[kind]),
    }
    theirs = TokenTrainer(str(base), args=trl.DPOConfig(str(tmp_path / "trl"), **OPTIONS), **given)
    expected = losses(theirs)
    config = DPOConfig(str(tmp_path / "own"), reference_store=str(tmp_path / "store"), **OPTIONS)
    # TRL's adapter is in bfloat16, ours in float32.
    np.testing.assert_allclose(
        losses(DPOTrainer(str(base), args=config, **given)), expected, atol=2e-4
    )
    set_seed(SEED)
    model = peft.get_peft_model(load(base, kind), adapter())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    given = {name: given[name] for name in ("train_dataset", "processing_class")}
    config = DPOConfig(str(tmp_path / "half"), reference_store=str(tmp_path / "store"), **OPTIONS)
    half = losses(DPOTrainer(model, args=config, **given))
    np.testing.assert_allclose(half, expected, atol=2e-5)
