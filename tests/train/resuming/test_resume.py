"""A resumed run continues as if it had never stopped, with the reference that it began with."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from dpofast.errors import CheckpointError, ConfigError, ReferenceStoreError
from tests.support import history, make_trainer, tiny_llama, token_pairs, train


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_goes_on_as_if_never_stopped(tmp_path, workers):
    """Resume after the first of an epoch's three steps, with and without worker processes."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_tokens_per_microbatch": 60}
    expected = train(make_trainer(tmp_path, options=saving))
    resumed = make_trainer(tmp_path, options={**saving, "dataloader_num_workers": workers})
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert history(resumed) == expected  # the first four come from the checkpoint
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "grad_norm" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_resumed_without_the_store_the_starts_reference_is_scored_again(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    expected = train(make_trainer(tmp_path, options=saving))
    shutil.rmtree(tmp_path / "store")
    resumed = make_trainer(tmp_path, options=saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.reference.store.totals().rows_scored == 20
    assert history(resumed) == expected


def test_resumed_from_the_moved_policy_the_recorded_reference_is_read_or_the_run_stops(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    expected = train(make_trainer(tmp_path, options=saving))
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    moved = AutoModelForCausalLM.from_pretrained(checkpoint)
    resumed = make_trainer(tmp_path, moved, options=saving)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert history(resumed) == expected
    shutil.rmtree(tmp_path / "store")
    moved = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ReferenceStoreError, match="before step 1"):
        make_trainer(tmp_path, moved, options=saving).train(resume_from_checkpoint=checkpoint)


def test_resume_true_passes_over_a_checkpoint_that_was_not_saved_to_its_end(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    expected = train(make_trainer(tmp_path, options=saving))
    torn = tmp_path / "run" / "checkpoint-6" / "trainer_state.json"
    torn.write_text(torn.read_text()[:200])
    resumed = make_trainer(tmp_path, options=saving)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == expected
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        make_trainer(tmp_path / "new").train(resume_from_checkpoint=True)
    shorter = make_trainer(tmp_path, options={**saving, "max_steps": 4})
    with pytest.raises(ConfigError, match="step 6, beyond the 4 of this run"):
        shorter.train(resume_from_checkpoint=True)


def test_resumed_with_another_ref_model_the_run_stops(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, ref_model=tiny_llama(seed=5), options=saving).train()
    other = make_trainer(tmp_path, ref_model=tiny_llama(seed=6), options=saving)
    with pytest.raises(ReferenceStoreError, match="ref_model is not the reference"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


@pytest.mark.parametrize("evaluate", ["train", "eval"])
def test_an_evaluation_before_a_resume_does_not_change_the_reference(tmp_path, evaluate):
    saving = {"save_strategy": "steps", "save_steps": 2}
    held_out = token_pairs(4, seed=4)
    straight = make_trainer(tmp_path, eval_dataset=held_out, options=saving)
    expected = train(straight), straight.evaluate()["eval_loss"]
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    moved = AutoModelForCausalLM.from_pretrained(checkpoint)
    resumed = make_trainer(tmp_path, moved, eval_dataset=held_out, options=saving)
    resumed.evaluate(resumed.train_dataset if evaluate == "train" else None)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert (history(resumed), resumed.evaluate()["eval_loss"]) == expected
