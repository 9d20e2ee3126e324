"""A run names, counts and pushes its checkpoints once they are whole."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from transformers import TrainerCallback

from dpofast.errors import CheckpointError
from dpofast.train.checkpoint.manifest import MANIFEST_FILE, Manifest, verify
from dpofast.train.checkpoint.resume import newest_whole
from tests.support import make_trainer, token_pairs, train

SAVING = {"save_strategy": "steps", "save_steps": 2}
BEST = {
    **SAVING,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
}


def names(folder):
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


class Watch(TrainerCallback):
    """Notes at each save which checkpoints there are, and whether the newest is whole."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_save(self, args, state, control, **kwargs):
        newest = self.folder / f"checkpoint-{state.global_step}"
        assert verify(newest) == []
        self.seen.append(names(self.folder))


def test_checkpoints_are_whole_and_those_beyond_the_limit_go(tmp_path):
    watch = Watch(tmp_path / "run")
    trainer = make_trainer(tmp_path, options={**SAVING, "save_total_limit": 2}, callbacks=[watch])
    train(trainer)
    assert watch.seen == [
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4", "checkpoint-6"],
    ]
    folder = tmp_path / "run" / "checkpoint-6"
    manifest = Manifest.read(folder)
    assert (manifest.run_id, manifest.step, manifest.ranks) == (trainer.run_id, 6, 1)
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest.files) == on_disk - {MANIFEST_FILE}
    assert {"optimizer.pt", "rng_state.pth", "trainer_state.json", "dpofast_state.json"} <= on_disk


def test_the_best_is_recorded_under_its_final_name(tmp_path):
    options = {**BEST, "save_total_limit": 1, "learning_rate": 2.0}  # the later, the worse
    watch = Watch(tmp_path / "run")
    arguments = {"eval_dataset": token_pairs(4, seed=4), "callbacks": [watch]}
    trainer = make_trainer(tmp_path, options=options, **arguments)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    step = trainer.state.best_global_step
    assert best == os.path.join(str(tmp_path / "run"), f"checkpoint-{step}")
    assert watch.seen[-1] == sorted({f"checkpoint-{step}", "checkpoint-6"})
    assert names(tmp_path / "run") == [f"checkpoint-{step}"]  # as transformers leaves it
    state = json.loads((tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


def test_a_model_alone_is_saved_whole_and_not_resumed_from(tmp_path):
    options = {**SAVING, "save_only_model": True, "save_total_limit": 1}
    make_trainer(tmp_path, options=options).train()
    assert names(tmp_path / "run") == ["checkpoint-6"]
    assert verify(tmp_path / "run" / "checkpoint-6") == []
    with pytest.raises(CheckpointError, match="only a model, as save_only_model was set"):
        make_trainer(tmp_path, options=options).train(resume_from_checkpoint=True)


def test_a_step_that_is_saved_again_replaces_its_checkpoint(tmp_path):
    expected = train(make_trainer(tmp_path, options=SAVING))
    folder = tmp_path / "run" / "checkpoint-6"
    (folder / "optimizer.pt").write_bytes(b"damaged")
    (folder / "leftover.bin").write_bytes(b"of the damaged one")
    resumed = make_trainer(tmp_path, options=SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.run_id == Manifest.read(tmp_path / "run" / "checkpoint-4").run_id
    assert verify(folder) == []
    assert not (folder / "leftover.bin").exists()
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert len(expected) == 6


def test_a_save_that_fails_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, options=SAVING)
    save = torch.save

    def fail_at_step_4(content, path, *args, **kwargs):
        save(content, path, *args, **kwargs)
        if trainer.state.global_step == 4 and str(path).endswith("scheduler.pt"):
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", fail_at_step_4)
    with pytest.raises(CheckpointError) as error:
        trainer.train()
    where = f"The checkpoint of step 4 can't be written into '{tmp_path}/run': "
    assert str(error.value).startswith(where)
    assert "the last whole checkpoint is checkpoint-2" in str(error.value)
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert newest_whole(tmp_path / "run", trainer.run_id) == (
        tmp_path / "run" / "checkpoint-2",
        [],
    )


def test_a_checkpoint_is_pushed_once_it_is_whole(tmp_path, monkeypatch):
    pushed = []

    def upload_folder(self, *, folder_path, path_in_repo=None, **options):
        if path_in_repo is not None:
            assert verify(folder_path) == []
            pushed.append((os.path.basename(folder_path), path_in_repo))
        return SimpleNamespace(done=lambda: True)

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/tuned"))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    options = {**SAVING, "push_to_hub": True, "hub_strategy": "checkpoint", "max_steps": 2}
    make_trainer(tmp_path, options=options).train()
    assert pushed == [("checkpoint-2", "last-checkpoint")]
