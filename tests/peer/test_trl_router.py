"""With the same micro-batches, the routers' auxiliary loss equals that of TRL's DPOTrainer."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from dpofast import DPOConfig, DPOTrainer
from tests.support import byte_tokenizer, tiny_mixtral, token_pairs

trl = pytest.importorskip("trl", reason="needs the extra `bench`")

pytestmark = pytest.mark.peer

PAIRS, PAIRS_PER_STEP, STEPS = 8, 4, 3
OPTIONS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": PAIRS_PER_STEP,
    "per_device_eval_batch_size": PAIRS,
    "router_aux_loss_coef": 0.2,
    "beta": 0.5,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 11,
}


class TokenTrainer(trl.DPOTrainer):
    """TRL's trainer for pairs of token ids; the original would tokenise texts."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


def run(trainer):
    """Train and evaluate: logs of the steps, metrics of the evaluation."""
    trainer.train()
    return [x for x in trainer.state.log_history if "grad_norm" in x], trainer.evaluate()


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_losses_gradients_and_evaluation_are_trls(tmp_path, layout):
    pairs, model = token_pairs(PAIRS), tiny_mixtral()
    arguments = {"train_dataset": pairs, "eval_dataset": pairs}
    theirs, their_evaluation = run(
        TokenTrainer(
            copy.deepcopy(model),
            ref_model=copy.deepcopy(model),
            args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), **OPTIONS),
            processing_class=byte_tokenizer(),
            **arguments,
        )
    )
    ours, evaluation = run(
        DPOTrainer(
            copy.deepcopy(model),
            args=DPOConfig(
                output_dir=str(tmp_path / "ours"),
                reference_store=str(tmp_path / "store"),
                layout=layout,
                **OPTIONS,
            ),
            processing_class=byte_tokenizer(),
            **arguments,
        )
    )
    assert len(ours) == len(theirs) == STEPS
    assert theirs[0]["aux_loss"] > 1
    for name in ("loss", "aux_loss", "grad_norm"):
        got, expected = ([log[name] for log in logs] for logs in (ours, theirs))
        np.testing.assert_allclose(got, expected, rtol=1e-4, err_msg=name)
    for name in ("eval_loss", "eval_aux_loss"):
        assert evaluation[name] == pytest.approx(their_evaluation[name], rel=1e-4), name
