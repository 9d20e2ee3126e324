"""Where a run begins in its output folder, whatever older runs have left there."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpofast.errors import CheckpointError, ConfigError
from dpofast.train.checkpoint.aside import OLDER_RUNS
from dpofast.train.checkpoint.manifest import MANIFEST_FILE
from dpofast.train.checkpoint.run_id import RUN_FILE, Run, read_run, write_run
from dpofast.train.checkpoint.start import Folder, choose_start, resume_point, settle_start
from tests.train.checkpoint.folders import DAMAGE, make_checkpoint

OLD, NEW = Run("a" * 32, "2026-01-01"), Run("b" * 32, "2026-01-02")
REPORTS = ("metrics.jsonl", "summary.json")


def folder_of(path: Path, **options) -> Folder:
    return Folder(**{"path": path, "saves": True, "overwrite": False, "verify": True, **options})


def make_run(path: Path, run: Run, *steps: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    write_run(path, run)
    for step in steps:
        make_checkpoint(path, step, run.run)


def begin(given, path: Path, **options):
    """Choose where a run begins, and make its folder ready."""
    folder = folder_of(path, **options)
    start = choose_start(given, folder)
    settle_start(start, folder, REPORTS)
    return start


def tree(path: Path) -> list[str]:
    found = [*path.glob("checkpoint-*"), *path.glob(f"{OLDER_RUNS}/*/*")]
    return sorted(str(each.relative_to(path)) for each in found)


@pytest.mark.parametrize("given", [None, False, "", "none", "False", True, "TRUE", "auto", "Auto"])
def test_spellings(given):
    text = str(given).lower()
    expected = {"true": True, "auto": "auto"}.get(text)
    assert resume_point(given) == expected


def test_a_folder_is_a_folder():
    assert resume_point("run/true") == "run/true"
    assert resume_point(Path("run")) == Path("run")


@pytest.mark.parametrize("given", [True, "auto"])
@pytest.mark.parametrize("has_saved", [False, True])
@pytest.mark.parametrize("old_steps", [(2, 4), (6, 8), (3, 5)])
def test_a_killed_run_goes_on_in_a_folder_that_an_older_run_had(
    tmp_path, given, has_saved, old_steps
):
    """The older run has lower, higher or the same steps as the new one."""
    make_run(tmp_path, OLD, *old_steps)
    new = begin(None, tmp_path, overwrite=True).run
    if has_saved:
        for step in (3, 5):
            make_checkpoint(tmp_path, step, new.run)
        start = begin(given, tmp_path)
        assert (start.checkpoint, start.run) == (tmp_path / "checkpoint-5", new)
    elif given is True:
        with pytest.raises(CheckpointError, match="no whole checkpoint of this run"):
            begin(given, tmp_path)
    else:
        start = begin(given, tmp_path)
        assert (start.checkpoint, start.is_new) == (None, True)
        assert read_run(tmp_path) == start.run != OLD
    assert tree(tmp_path)[:2] == [f"{OLDER_RUNS}/{OLD.run}/checkpoint-{n}" for n in old_steps]
    older = begin(True, tmp_path / OLDER_RUNS / OLD.run)
    assert (older.checkpoint.name, older.run) == (f"checkpoint-{old_steps[-1]}", OLD)


@pytest.mark.parametrize("given", [True, "auto"])
@pytest.mark.parametrize("old_step", [2, 4, 6])
def test_checkpoints_of_an_older_run_between_those_of_the_folders_own(tmp_path, given, old_step):
    """They were copied there, or another version had begun the run without moving them."""
    make_run(tmp_path, NEW, 3, 5)
    make_checkpoint(tmp_path, old_step, OLD.run)
    if old_step > 5:
        with pytest.raises(ConfigError, match=r"also holds checkpoint-6.*overwrite_output_dir"):
            begin(given, tmp_path)
    start = begin(given, tmp_path, overwrite=True)
    assert (start.checkpoint, start.run) == (tmp_path / "checkpoint-5", NEW)
    assert (tmp_path / f"checkpoint-{old_step}").exists() == (old_step < 5)


def test_a_fresh_start_is_refused_only_if_it_would_save(tmp_path):
    make_run(tmp_path, OLD, 2, 4)
    with pytest.raises(ConfigError) as error:
        begin(None, tmp_path)
    for remedy in ("resume_from_checkpoint: true", "another output_dir", "overwrite_output_dir: "):
        assert remedy in str(error.value)
    assert "checkpoint-2 and checkpoint-4 of an earlier run" in str(error.value)
    start = begin(None, tmp_path, saves=False, overwrite=True)
    assert start.run != OLD
    assert read_run(tmp_path) == OLD, "the folder stays that of the run that can be resumed"
    assert begin(True, tmp_path).checkpoint == tmp_path / "checkpoint-4"


def test_checkpoints_without_a_manifest_are_never_overwritten(tmp_path):
    (make_checkpoint(tmp_path, 4) / MANIFEST_FILE).unlink()
    with pytest.raises(ConfigError, match="holds checkpoint-4 of an earlier run"):
        begin(None, tmp_path)
    with pytest.raises(ConfigError) as error:
        begin("auto", tmp_path)
    for part in ("auto can't go on", "checkpoint-4: it has no manifest", "overwrite_output_dir"):
        assert part in str(error.value)
    assert "resume_from_checkpoint: true" not in str(error.value)  # which would fail as well
    with pytest.raises(CheckpointError, match="checkpoint-4: it has no manifest"):
        begin(True, tmp_path)
    begin("auto", tmp_path, overwrite=True)
    assert tree(tmp_path) == [f"{OLDER_RUNS}/unknown/checkpoint-4"]


def test_going_back_to_an_older_checkpoint_needs_the_option(tmp_path):
    make_run(tmp_path, OLD, 2, 4, 6)
    (tmp_path / "metrics.jsonl").write_text("{}")
    back = str(tmp_path / "checkpoint-2")
    with pytest.raises(ConfigError, match=r"checkpoint-4 and checkpoint-6.*overwrite_output_dir"):
        begin(back, tmp_path)
    assert begin(back, tmp_path, saves=False).run == OLD
    assert begin(tmp_path / "checkpoint-6", tmp_path).run == OLD
    start = begin(back, tmp_path, overwrite=True)
    assert (str(start.checkpoint), start.run, read_run(tmp_path)) == (back, OLD, OLD)
    older = [f"{OLDER_RUNS}/{OLD.run}/{n}" for n in ("checkpoint-4", "checkpoint-6", REPORTS[0])]
    assert tree(tmp_path) == [*older, "checkpoint-2"]
    assert (tmp_path / "metrics.jsonl").exists()
    make_checkpoint(tmp_path, 4, OLD.run)
    begin(back, tmp_path, overwrite=True)
    assert f"{OLDER_RUNS}/{OLD.run}/checkpoint-4.2" in tree(tmp_path)


def test_a_damaged_newest_one_is_in_nobodys_way(tmp_path, caplog):
    make_run(tmp_path, OLD, 2, 4, 6)
    DAMAGE["truncated"](tmp_path / "checkpoint-6" / "optimizer.pt")
    (tmp_path / "checkpoint-4" / MANIFEST_FILE).write_text("{")
    start = begin(True, tmp_path)
    assert start.checkpoint == tmp_path / "checkpoint-2"
    assert "optimizer.pt is truncated" in caplog.text
    assert begin(str(tmp_path / "checkpoint-2"), tmp_path).run == OLD


def test_another_folders_checkpoint_begins_a_new_run(tmp_path):
    make_run(tmp_path / "old", OLD, 2, 4)
    (tmp_path / "new").mkdir()
    given = str(tmp_path / "old" / "checkpoint-2")
    start = begin(given, tmp_path / "new")
    assert (str(start.checkpoint), start.is_new) == (given, True)
    assert read_run(tmp_path / "new") == start.run != OLD
    make_checkpoint(tmp_path / "new", 3, start.run.run)
    with pytest.raises(ConfigError, match="holds checkpoint-3, which the run that goes on from"):
        begin(given, tmp_path / "new")


def test_without_the_runs_file_the_only_run_goes_on(tmp_path):
    make_run(tmp_path, OLD, 2)
    (tmp_path / RUN_FILE).unlink()
    assert begin(True, tmp_path).run.run == OLD.run
    assert read_run(tmp_path).run == OLD.run
    (tmp_path / RUN_FILE).unlink()
    make_checkpoint(tmp_path, 4, NEW.run)
    with pytest.raises(CheckpointError, match=f"checkpoints of 2 runs, and has no {RUN_FILE}"):
        begin(True, tmp_path)
    (tmp_path / RUN_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="name a checkpoint's folder"):
        begin(True, tmp_path)
    assert begin(str(tmp_path / "checkpoint-4"), tmp_path).run.run == NEW.run


@pytest.mark.parametrize("renames", range(6))
def test_a_kill_between_any_two_moves_is_harmless(tmp_path, monkeypatch, renames):
    make_run(tmp_path, OLD, 2, 4)
    for name in REPORTS:
        (tmp_path / name).write_text("old")
    left = [renames]

    def limited(move):
        def moving(self, target):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return move(self, target)

        return moving

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(Path, name, limited(getattr(Path, name)))
        with pytest.raises(KeyboardInterrupt):
            begin(None, tmp_path, overwrite=True)
    if read_run(tmp_path) == OLD:
        assert choose_start(True, folder_of(tmp_path)).checkpoint == tmp_path / "checkpoint-4"
    else:
        with pytest.raises(CheckpointError, match="no whole checkpoint of this run"):
            choose_start(True, folder_of(tmp_path))
        start = choose_start("auto", folder_of(tmp_path, overwrite=True))
        assert start.checkpoint is None
    new = begin(None, tmp_path, overwrite=True).run
    assert read_run(tmp_path) == new
    names = ("checkpoint-2", "checkpoint-4", RUN_FILE, *REPORTS)
    assert tree(tmp_path) == [f"{OLDER_RUNS}/{OLD.run}/{name}" for name in names]
