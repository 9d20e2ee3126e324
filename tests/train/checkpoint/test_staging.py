"""A kill between any two operations leaves the old checkpoints, or the old ones and the new one."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from dpofast.train.checkpoint.aside import OLDER_RUNS
from dpofast.train.checkpoint.manifest import MANIFEST_FILE
from dpofast.train.checkpoint.resume import newest_whole, step_folders, why_not_whole
from dpofast.train.checkpoint.rotate import rotate
from dpofast.train.checkpoint.staging import (
    delete,
    list_files,
    make_area,
    missing_of_ranks,
    publish,
    recover,
    saving_area,
    staged_folder,
)
from tests.train.checkpoint.folders import RUN, make_checkpoint, seal

KILLED = 77
OPERATIONS = ("rename", "unlink", "rmdir", "mkdir", "fsync", "open")


def few_files(marker: bytes) -> dict[str, bytes]:
    return {"scheduler.pt": marker, "rng_state.pth": b"state", "global_step4/shard.pt": b"shard"}


def save(run_dir: Path, step: int, marker: bytes) -> None:
    """Save a checkpoint whose scheduler.pt is `marker`."""
    make_area(run_dir, step)
    make_checkpoint(saving_area(run_dir, step), step, contents=few_files(marker))
    publish(run_dir, step)


def killed_at(number: int, work) -> bool:
    """Do `work` in a process that is killed before its operation `number`; whether it was."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) in (0, KILLED)
        return os.waitstatus_to_exitcode(status) == KILLED
    count = 0

    def watched(operation):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os._exit(KILLED)
            return operation(*args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(os, name, watched(getattr(os, name)))
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def hidden(run_dir: Path) -> list[str]:
    return [path.name for path in run_dir.iterdir() if path.name.startswith("_")]


def torn(run_dir: Path) -> list[Path]:
    """Checkpoints that have their name and aren't whole."""
    return [path for path in step_folders(run_dir) if why_not_whole(path, RUN) is not None]


def marker_of(checkpoint: Path | None) -> bytes | None:
    return None if checkpoint is None else (checkpoint / "scheduler.pt").read_bytes()


@pytest.mark.parametrize("is_replaced", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_save_killed_anywhere_leaves_the_old_state_or_the_new_one(tmp_path, is_replaced):
    step = 4 if is_replaced else 6
    number, found, was_killed = 0, set(), True
    while was_killed:
        number += 1
        run_dir = tmp_path / str(number)
        make_checkpoint(run_dir, 4, contents=few_files(b"old"))
        was_killed = killed_at(number, partial(save, run_dir, step, b"new"))
        assert torn(run_dir) == []
        # Its recovery may be killed as well.
        killed_at(1 + number % 5, partial(recover, run_dir))
        recover(run_dir)
        assert hidden(run_dir) == []
        chosen, passed_over = newest_whole(run_dir, RUN)
        assert passed_over == []
        found.add(marker_of(chosen))
    assert found == {b"old", b"new"}
    assert marker_of(chosen) == b"new"
    assert number > 15


def test_a_deletion_killed_anywhere_leaves_all_or_nothing(tmp_path):
    number, was_killed = 0, True
    while was_killed:
        number += 1
        run_dir = tmp_path / str(number)
        for step in (2, 4):
            make_checkpoint(run_dir, step)
        was_killed = killed_at(number, partial(rotate, run_dir, RUN, 1))
        assert torn(run_dir) == []
        recover(run_dir)
        names = sorted(path.name for path in run_dir.iterdir())
        assert names in (["checkpoint-2", "checkpoint-4"], ["checkpoint-4"])
        assert newest_whole(run_dir, RUN) == (run_dir / "checkpoint-4", [])
    assert names == ["checkpoint-4"]
    assert number > 5


def test_a_checkpoint_with_a_manifest_gets_its_name(tmp_path):
    make_area(tmp_path, 4)
    folder = make_checkpoint(saving_area(tmp_path, 4), 4)
    recover(tmp_path)
    assert not folder.exists()
    assert newest_whole(tmp_path, RUN) == (tmp_path / "checkpoint-4", [])


@pytest.mark.parametrize("damage", ["no manifest", "cut", "no folder"])
def test_what_an_interrupted_save_leaves_is_deleted(tmp_path, damage):
    make_area(tmp_path, 4)
    folder = make_checkpoint(saving_area(tmp_path, 4), 4)
    if damage == "cut":
        os.truncate(folder / "optimizer.pt", 5)
    else:
        (folder / MANIFEST_FILE).unlink()
    if damage == "no folder":
        folder.rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").rename(saving_area(tmp_path, 4) / "checkpoint-5")
    recover(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_do_not_disturb_the_next_save(tmp_path):
    make_area(tmp_path, 4)
    (staged_folder(tmp_path, 4) / "rng_state_7.pth").write_text("of a run on more ranks")
    make_checkpoint(tmp_path, 4).rename(tmp_path / "_replaced-checkpoint-4")
    make_checkpoint(tmp_path, 4)
    save(tmp_path, 4, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert "rng_state_7.pth" not in list_files(tmp_path / "checkpoint-4")
    make_checkpoint(tmp_path, 2).rename(tmp_path / "_deleting-checkpoint-2")
    delete(make_checkpoint(tmp_path, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_checkpoint_whose_successor_is_gone_gets_its_name_back(tmp_path):
    make_checkpoint(tmp_path, 4).rename(tmp_path / "_replaced-checkpoint-4")
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_recovering_where_nothing_was_saved_does_nothing(tmp_path):
    recover(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_files_of_ranks_are_missed():
    names = [
        "rng_state_0.pth",
        "rng_state_2.pth",
        "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ]
    names += ["global_step4/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"]
    names += ["global_step4/zero_pp_rank_2_mp_rank_00_model_states.pt"]
    assert missing_of_ranks(names, range(3), 3, is_sharded=True) == [
        "rng_state_1.pth",
        "zero_pp_rank_2_mp_rank_*_optim_states.pt",
    ]
    assert missing_of_ranks(names, [0, 2], 3, is_sharded=False) == []
    assert missing_of_ranks(["rng_state.pth"], [0], 1, is_sharded=False) == []
    assert missing_of_ranks(names, [0], 1, is_sharded=False) == ["rng_state.pth"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(handle):
        fsync(handle)
        events.append(os.readlink(f"/proc/self/fd/{handle}"))

    def noting_rename(source, target, **options):
        rename(source, target, **options)
        events.append(f"renamed to {target}")

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    make_area(tmp_path, 4)
    staged = staged_folder(tmp_path, 4)
    make_checkpoint(staged.parent, 4)
    (staged / "deeper" / "still").mkdir(parents=True)
    seal(staged, 4)
    publish(tmp_path, 4)
    renamed = events.index(f"renamed to {tmp_path / 'checkpoint-4'}")
    folders = {staged, staged / "global_step4", staged / "deeper", staged / "deeper" / "still"}
    assert {str(path) for path in folders} <= set(events[:renamed])
    assert events.index(str(staged / MANIFEST_FILE)) < events.index(str(staged))
    assert events[renamed + 1] == str(tmp_path)


def test_another_runs_checkpoint_of_the_same_step_is_moved_and_not_deleted(tmp_path):
    foreign = make_checkpoint(tmp_path, 4, run_id="run-b")
    (make_checkpoint(tmp_path, 6) / MANIFEST_FILE).unlink()  # by an older version
    for step in (4, 6):
        save(tmp_path, step, b"new")
        assert newest_whole(tmp_path, RUN)[0] == tmp_path / f"checkpoint-{step}"
    older = tmp_path / OLDER_RUNS
    assert newest_whole(older / "run-b", "run-b") == (older / "run-b" / foreign.name, [])
    assert (older / "unknown" / "checkpoint-6").is_dir()
