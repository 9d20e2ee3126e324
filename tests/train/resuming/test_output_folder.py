"""What a run does in an output folder that other runs have used, use, or have filled."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from dpofast import DPOTrainer
from dpofast.errors import CheckpointError, ConfigError
from dpofast.model.parts import num_bytes
from dpofast.train.checkpoint.aside import OLDER_RUNS
from dpofast.train.checkpoint.lock import locked
from dpofast.train.checkpoint.resume import newest_whole
from dpofast.train.checkpoint.run_id import read_run
from tests.support import history, make_trainer, train
from tests.train.small_disk import make_read_only, small_disk

SAVING = {
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 4,
    "overwrite_output_dir": False,
}


class Stops(TrainerCallback):
    """Ends a run with an error after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise ZeroDivisionError


def logged_steps(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if "grad_norm" in line]


def test_runs_that_save_nothing_may_share_a_folder(tmp_path):
    options = {**SAVING, "save_strategy": "no"}
    first = train(make_trainer(tmp_path, options=options))
    assert train(make_trainer(tmp_path, options=options)) == first
    assert logged_steps(tmp_path / "run") == [1, 2, 3, 4]


def test_auto_starts_and_resumes_in_one_process(tmp_path):
    expected = train(make_trainer(tmp_path / "whole", options=SAVING))
    for step in (1, 3):  # before the first checkpoint, and after it
        trainer = make_trainer(tmp_path, options=SAVING, callbacks=[Stops(step)])
        with pytest.raises(ZeroDivisionError):
            trainer.train(resume_from_checkpoint="auto")
    run_id = read_run(tmp_path / "run").run
    trainer = make_trainer(tmp_path, options=SAVING)
    trainer.train(resume_from_checkpoint="auto")
    assert (history(trainer), trainer.run_id) == (expected, run_id)
    assert logged_steps(tmp_path / "run") == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="checkpoint-2 and checkpoint-4 of an earlier run"):
        make_trainer(tmp_path, options=SAVING).train()


@pytest.mark.slow  # several runs
def test_the_older_run_is_moved_with_its_reports_and_can_go_on_there(tmp_path):
    run = tmp_path / "run"
    old = make_trainer(tmp_path, options=SAVING, callbacks=[Stops(3)])
    with pytest.raises(ZeroDivisionError):
        old.train()
    overwriting = {**SAVING, "overwrite_output_dir": True, "seed": 4}
    train(make_trainer(tmp_path, options=overwriting))
    assert logged_steps(run) == [1, 2, 3, 4]
    aside = run / OLDER_RUNS / old.run_id
    assert logged_steps(aside) == [1, 2]
    again = make_trainer(tmp_path, options={**SAVING, "output_dir": str(aside)})
    again.train(resume_from_checkpoint=True)
    assert history(again) == train(make_trainer(tmp_path / "whole", options=SAVING))


@pytest.mark.slow  # several runs
def test_a_checkpoint_of_another_folder_begins_a_run_with_logs_of_its_own(tmp_path):
    old = make_trainer(tmp_path / "old", options=SAVING)
    expected = train(old)
    train(make_trainer(tmp_path, options={**SAVING, "save_strategy": "no"}))
    store = str(tmp_path / "old" / "store")
    fork = make_trainer(tmp_path, options={**SAVING, "reference_store": store})
    fork.train(resume_from_checkpoint=str(tmp_path / "old" / "run" / "checkpoint-2"))
    assert history(fork) == expected
    assert logged_steps(tmp_path / "run") == [3, 4]
    assert read_run(tmp_path / "run").run == fork.run_id != old.run_id


def test_a_folder_in_use_is_refused_before_anything_is_scored(tmp_path):
    trainer = make_trainer(tmp_path)
    with locked(tmp_path / "run"), pytest.raises(CheckpointError, match=f"process {os.getpid()} "):
        trainer.train()
    assert not (tmp_path / "store").exists()
    trainer.train()


def test_the_folder_of_the_model_is_refused(tmp_path):
    model = tmp_path / "run"
    make_trainer(tmp_path / "other").model.save_pretrained(model)
    before = sorted(path.name for path in model.iterdir())
    with pytest.raises(ConfigError, match=r"output_dir: .* is the folder of the model"):
        make_trainer(tmp_path, str(model))
    with pytest.raises(ConfigError, match=r"output_dir: .* is the folder of ref_model"):
        make_trainer(tmp_path, ref_model=str(model))
    store = {"reference_store": str(tmp_path)}
    with pytest.raises(
        ConfigError, match=r"output_dir: .* is inside the folder of reference_store"
    ):
        make_trainer(tmp_path, options=store)
    assert sorted(path.name for path in model.iterdir()) == before


def test_an_option_that_train_is_not_given_is_said(tmp_path, caplog):
    make_trainer(tmp_path, options={**SAVING, "resume_from_checkpoint": "auto"}).train()
    assert "has no effect on its own: call train(resume_from_checkpoint=" in caplog.text


def test_a_start_that_is_refused_leaves_the_older_run_in_its_place(tmp_path):
    make_trainer(tmp_path, options={**SAVING, "max_steps": 2}).train()
    owner = read_run(tmp_path / "run")
    wrong = {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"no_such": 1}}
    options = {**SAVING, "overwrite_output_dir": True, **wrong}
    with pytest.raises(ConfigError, match="no_such"):
        make_trainer(tmp_path, options=options).train()
    assert read_run(tmp_path / "run") == owner
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


class PlainSteps(DPOTrainer):
    """Trains with SGD, whose states take no room."""

    def create_optimizer(self, *args, **options):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        return self.optimizer


def test_an_optimizer_of_a_subclass_counts_as_nothing(tmp_path, monkeypatch):
    def start():
        trainer = make_trainer(tmp_path, options={**SAVING, "max_steps": 1}, trainer_class=kind)
        weights = sum(map(num_bytes, trainer.model.parameters()))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * weights))
        trainer.train()

    kind = DPOTrainer
    with pytest.raises(ConfigError, match="a checkpoint of this run takes"):
        start()
    kind = PlainSteps
    start()


class FillsDisk(TrainerCallback):
    """After a log, takes all room on a disk but `pages`, just before the save of that step."""

    def __init__(self, disk, step, pages):
        self.disk, self.step, self.pages = disk, step, pages

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            free = os.statvfs(self.disk)
            (self.disk / "filler").write_bytes(bytes((free.f_bavail - self.pages) * free.f_bsize))


def pages_before(checkpoint, name):
    """Pages of the files that a save writes before this one, and half of its own."""
    files = sorted(
        (path for path in checkpoint.iterdir()), key=lambda path: path.stat().st_mtime_ns
    )
    sizes = {path.name: -(-path.stat().st_size // 4096) for path in files}
    names = list(sizes)
    return sum(sizes[other] for other in names[: names.index(name)]) + sizes[name] // 2


KINDS = (
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "trainer_state.json",
    "dpofast_manifest.json",
)


@pytest.mark.slow  # five kinds of files, three runs each
def test_a_disk_that_fills_up_at_any_file_of_a_save(tmp_path):
    expected = train(make_trainer(tmp_path / "whole", options=SAVING))
    for name in KINDS:
        folder = tmp_path / name
        pages = pages_before(tmp_path / "whole" / "run" / "checkpoint-4", name)
        with small_disk(folder / "run", 4 << 20) as disk:
            fills = FillsDisk(disk, 4, pages)
            trainer = make_trainer(folder, options=SAVING, callbacks=[fills])
            with pytest.raises(CheckpointError) as error:
                trainer.train()
            message = str(error.value)
            assert message.startswith(
                f"The checkpoint of step 4 can't be written into {str(disk)!r}"
            )
            assert "No space left on device (a save takes about " in message, message
            assert "the last whole checkpoint is checkpoint-2: make room" in message
            assert error.value.exit_code == 2
            assert newest_whole(disk, trainer.run_id) == (disk / "checkpoint-2", [])
            (disk / "filler").unlink()
            resumed = make_trainer(folder, options=SAVING)
            resumed.train(resume_from_checkpoint=True)
            assert history(resumed) == expected


def test_a_disk_that_is_read_only_is_refused_at_once(tmp_path):
    with small_disk(tmp_path / "run", 4 << 20) as disk:
        make_read_only(disk)
        with pytest.raises(ConfigError, match=r"no file can be written .*: Read-only file system"):
            make_trainer(tmp_path, options=SAVING)
