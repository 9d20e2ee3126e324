"""A run that was killed after its last checkpoint is exported, and nothing is trained on."""

from __future__ import annotations

import json
import random

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from dpofast.errors import CheckpointError
from tests.support import make_trainer, token_pairs
from tests.train.checkpoint.folders import flip_a_bit

# An epoch has three steps, so the run ends within one.
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
BEST = {
    **SAVING,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # so the first of them is the best
}
LORA = LoraConfig(r=2, target_modules=["q_proj"])


def same_tensors(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("resume", "options", "arguments", "file"),
    [
        pytest.param(True, SAVING, {}, "model.safetensors", id="within an epoch"),
        pytest.param(
            "auto",
            {**SAVING, "max_steps": 6},
            {},
            "model.safetensors",
            id="at an epoch's end",
            marks=pytest.mark.slow,  # two more runs
        ),
        pytest.param(
            True,
            SAVING,
            {"peft_config": LORA},
            "adapter_model.safetensors",
            id="adapter",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "auto",
            BEST,
            {"eval_dataset": token_pairs(4, seed=4)},
            "model.safetensors",
            id="best",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_killed_after_its_last_checkpoint_is_exported(
    tmp_path, resume, options, arguments, file
):
    trained = make_trainer(tmp_path, options=options, **arguments)
    trained.train()
    run, last = tmp_path / "run", options["max_steps"]
    saved = run / f"checkpoint-{last}"
    if options is BEST:
        saved = run / "checkpoint-2"
        assert trained.state.best_model_checkpoint == str(saved)
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in lines if "train_runtime" not in line]  # as a killed run leaves it
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for _ in range(2):
        trainer = make_trainer(tmp_path, options=options, **arguments)
        output = trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        assert (output.global_step, trainer.pairs_trained) == (last, 0)
        assert "train_loss" not in output.metrics
        assert same_tensors(run / file, saved / file)
        assert (run / "metrics.jsonl").read_text().splitlines() == lines
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["resumed_at_end"], summary["global_step"]) == (True, last)
        assert summary["first_loss"] is summary["train_loss"] is summary["pairs_per_second"] is None


@pytest.mark.slow  # two runs
def test_the_summary_of_the_run_that_trained_is_kept(tmp_path):
    make_trainer(tmp_path, options=SAVING).train()
    before = (tmp_path / "run" / "summary.json").read_text()
    make_trainer(tmp_path, options=SAVING).train(resume_from_checkpoint=True)
    assert (tmp_path / "run" / "summary.json").read_text() == before
    assert json.loads(before)["resumed_at_end"] is False


@pytest.mark.slow  # four runs
def test_the_best_model_is_found_in_a_folder_that_has_moved_and_must_be_whole(tmp_path):
    arguments = {"eval_dataset": token_pairs(4, seed=4)}
    make_trainer(tmp_path, options=BEST, **arguments).train()
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    options = {**BEST, "output_dir": str(moved)}
    trainer = make_trainer(tmp_path, options=options, **arguments)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    best = moved / "checkpoint-2" / "model.safetensors"
    assert trainer.state.best_model_checkpoint == str(best.parent)
    assert same_tensors(moved / "model.safetensors", best)
    flip_a_bit(best, random.Random(0))
    with pytest.raises(CheckpointError, match=r"best checkpoint, .*model\.safetensors has changed"):
        make_trainer(tmp_path, options=options, **arguments).train(resume_from_checkpoint=True)
    options["load_best_model_at_end"] = False
    make_trainer(tmp_path, options=options, **arguments).train(resume_from_checkpoint=True)
