"""The token limit of packed rows: set once, equal on all ranks, kept by a resumed run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from dpofast import DPOTrainer
from dpofast.data.packing.collate import Layout
from dpofast.model.scorer import SequenceScorer
from dpofast.train.steps import loaders, memory
from dpofast.train.steps.loaders import StepLoaders
from tests.support import history, make_trainer, tiny_llama, token_pairs, train

SAVING = {"save_strategy": "steps", "save_steps": 2}


def settings(device, tokens=None):
    return SimpleNamespace(max_tokens_per_microbatch=tokens, device=torch.device(device))


def settled():
    return SimpleNamespace(settle=lambda: None)


def test_on_a_gpu_what_fits_is_asked_for_once():
    asked = []
    made = StepLoaders(
        settings("cuda"), Layout("shared"), settled(), lambda: asked.append(1) or 4096 * len(asked)
    )
    assert not asked
    for _ in range(2):
        made.settle()
        assert made.row_tokens == 4096
    made.settle(2560)
    assert made.row_tokens == 2560


def test_neither_on_a_cpu_nor_where_the_options_say():
    def never():
        raise AssertionError

    def row_tokens(settings, layout, recorded=None):
        made = StepLoaders(settings, Layout(layout), settled(), never)
        made.settle(recorded)
        return made.row_tokens

    assert row_tokens(settings("cpu"), "unshared") == 2048
    assert row_tokens(settings("cuda", 100), "shared", recorded=2560) == 100
    assert row_tokens(settings("cuda"), "padded") is None


def test_the_rank_with_the_least_memory_decides(tmp_path, monkeypatch):
    made = make_trainer(tmp_path)
    monkeypatch.setattr(memory, "free_device_bytes", lambda _: 2 * 10**9)
    own = memory.row_tokens_on_all_ranks(made)
    assert own > 1024
    gathered = torch.tensor([own, 768, 1024])
    monkeypatch.setattr(made.accelerator, "gather", lambda tokens: gathered)
    assert memory.row_tokens_on_all_ranks(made) == 768


def test_a_resumed_run_packs_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "CPU_ROW_TOKENS", 60)  # several rows per step
    expected = train(make_trainer(tmp_path, options=SAVING))
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert json.loads((checkpoint / "dpofast_state.json").read_text())["row_tokens"] == 60
    monkeypatch.setattr(loaders, "CPU_ROW_TOKENS", 2048)
    resumed = make_trainer(tmp_path, options=SAVING)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert history(resumed) == expected
    assert resumed.run_summary()["packing"]["max_tokens"] == 60


def test_a_checkpoint_of_before_rows_were_recorded_is_resumed(tmp_path):
    expected = train(make_trainer(tmp_path, options=SAVING))
    state = tmp_path / "run" / "checkpoint-4" / "dpofast_state.json"
    recorded = json.loads(state.read_text())
    del recorded["row_tokens"]
    state.write_text(json.dumps(recorded))
    (state.parent / "dpofast_manifest.json").unlink()
    resumed = make_trainer(tmp_path, options={**SAVING, "verify_checkpoint": False})
    resumed.train(resume_from_checkpoint=str(state.parent))
    assert history(resumed) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_gives_the_same_steps(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(loaders, "CPU_ROW_TOKENS", 60)
    made = make_trainer(tmp_path, options={"dataloader_num_workers": workers})
    steps = list(made.get_train_dataloader())
    alone = list(make_trainer(tmp_path).get_train_dataloader())
    assert len(steps) == len(alone) == 3
    for step, other in zip(steps, alone, strict=True):
        assert step.num_pairs == other.num_pairs
        rows = zip(step.micro_batches, other.micro_batches, strict=True)
        assert all(torch.equal(row.input_ids, same.input_ids) for row, same in rows)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_tokens_per_microbatch": 60}, "tokens"),
        ({"max_tokens_per_microbatch": 60, "precompute_ref_batch_size": 3}, 6),
        ({"layout": "padded"}, 4),
        ({"layout": "padded", "precompute_ref_batch_size": 3}, 6),
    ],
    ids=["packed", "packed, by pairs", "padded", "padded, by pairs"],
)
def test_references_are_scored_in_rows_as_long_as_training_takes_them(
    tmp_path, monkeypatch, options, expected
):
    calls, launch = [], SequenceScorer.launch

    def counted(self, sequences):
        calls.append((len(sequences), self.num_tokens(sequences)))
        return launch(self, sequences)

    monkeypatch.setattr(SequenceScorer, "launch", counted)
    make_trainer(tmp_path, options=options).score_datasets()
    sizes, tokens = zip(*calls, strict=True)
    assert sum(sizes) == 20
    if expected == "tokens":
        assert max(tokens) <= 60
        assert len(calls) < 1.5 * sum(tokens) / 60
    else:
        assert max(sizes) == expected
        assert len(calls) == -(-20 // expected)


def test_a_loader_outside_training_follows_the_options_as_they_are_now(tmp_path):
    made = make_trainer(tmp_path)
    assert len(made.get_train_dataloader()) == 3
    made.args.per_device_train_batch_size = 1
    assert [step.num_pairs for step in made.get_train_dataloader()] == [2, 2, 2, 2, 2]


def test_the_summary_has_the_packing_of_the_pairs_that_were_trained(tmp_path):
    made = make_trainer(tmp_path, ref_model=tiny_llama())
    first, other = made.train_dataset, token_pairs(6, seed=5)
    made.train()
    expected = made.run_summary()["packing"]
    made.train_dataset = other
    made.train()
    assert made.run_summary()["packing"] != expected
    made.train_dataset = first
    made.train()
    assert made.run_summary()["packing"] == expected


def test_an_evaluation_loader_gets_pairs_that_a_subclass_can_select(tmp_path):
    class Half(DPOTrainer):
        def get_eval_dataloader(self, eval_dataset=None):
            return super().get_eval_dataloader(eval_dataset.select(range(2)))

    made = make_trainer(tmp_path, trainer_class=Half)
    assert made.evaluate(token_pairs(4, seed=9))["eval_samples_per_second"] > 0
    assert made.data.datasets[-1].name == "eval_2"
