"""save_total_limit counts whole checkpoints, and the last good one stays."""

from __future__ import annotations

from dpofast.train.checkpoint.rotate import rotate
from tests.train.checkpoint.folders import CONTENTS, DAMAGE, RUN, make_checkpoint


def left(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.iterdir())


def make(folder, *steps):
    return [make_checkpoint(folder, step) for step in steps]


def test_the_oldest_are_deleted(tmp_path):
    make(tmp_path, 2, 4, 10, 8)
    assert rotate(tmp_path, RUN, None) == rotate(tmp_path, RUN, 0) == []
    rotate(tmp_path, RUN, 4)
    assert left(tmp_path) == [2, 4, 8, 10]
    assert [path.name for path in rotate(tmp_path, RUN, 2)] == ["checkpoint-2", "checkpoint-4"]
    assert left(tmp_path) == [8, 10]


def test_the_best_stays_and_counts(tmp_path):
    best, *_ = make(tmp_path, 2, 4, 6, 8)
    rotate(tmp_path, RUN, 2, [best, None])
    assert left(tmp_path) == [2, 8]
    rotate(tmp_path, RUN, 1, [str(best)])
    assert left(tmp_path) == [2, 8]


def test_a_damaged_newer_one_does_not_count(tmp_path):
    *_, newest = make(tmp_path, 2, 4, 6)
    DAMAGE["truncated"](newest / "optimizer.pt")
    rotate(tmp_path, RUN, 1)
    assert left(tmp_path) == [4, 6]


def test_what_was_just_saved_stays_though_it_is_not_the_newest(tmp_path):
    just_saved, *_ = make(tmp_path, 2, 4, 6)
    rotate(tmp_path, RUN, 1, [just_saved])
    assert left(tmp_path) == [2, 6]


def test_other_runs_are_left_alone(tmp_path):
    make(tmp_path, 2, 4)
    make_checkpoint(tmp_path, 1, run_id="run-b")
    make_checkpoint(tmp_path, 9, run_id="run-b")
    rotate(tmp_path, RUN, 1)
    assert left(tmp_path) == [1, 4, 9]


def test_a_folder_that_cannot_be_deleted_is_a_warning(tmp_path, caplog, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    make(tmp_path, 2, 4)
    monkeypatch.setattr("os.rename", refuse)
    rotate(tmp_path, RUN, 1)
    assert left(tmp_path) == [2, 4]
    assert "checkpoint-2 can't be deleted" in caplog.text


def test_models_without_a_training_state_count(tmp_path):
    for step in (2, 4):
        model = {"model.safetensors": CONTENTS["model.safetensors"]}
        make_checkpoint(tmp_path, step, contents=model)
    rotate(tmp_path, RUN, 1)
    assert left(tmp_path) == [4]


def test_at_the_end_the_best_stays_instead_of_the_newest(tmp_path):
    _, best, _ = make(tmp_path, 2, 4, 6)
    rotate(tmp_path, RUN, 1, [best], keep_newest=False)
    assert left(tmp_path) == [4]
