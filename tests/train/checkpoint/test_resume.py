"""A run resumes from its newest whole checkpoint, and says which it passed over and why."""

from __future__ import annotations

import logging
import random
import shutil

import pytest

from dpofast.errors import CheckpointError
from dpofast.train.checkpoint.manifest import MANIFEST_FILE
from dpofast.train.checkpoint.resume import (
    check_best,
    check_named,
    newest_whole,
    recorded_run_id,
    report_passed_over,
    step_folders,
)
from tests.train.checkpoint.folders import (
    CONTENTS,
    DAMAGE,
    RUN,
    files_of,
    flip_a_bit,
    make_checkpoint,
)


def test_the_newest_is_that_of_the_highest_step(tmp_path):
    for step in (2, 10, 9):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-11").write_text("no folder")
    assert newest_whole(tmp_path, RUN) == (tmp_path / "checkpoint-10", [])
    assert [path.name for path in step_folders(tmp_path)] == [
        "checkpoint-10", "checkpoint-9", "checkpoint-2",
    ]  # fmt: skip
    assert newest_whole(tmp_path / "none", RUN) == (None, [])


@pytest.mark.parametrize("way", DAMAGE)
def test_the_one_before_is_taken_whatever_file_is_damaged(tmp_path, way):
    older = make_checkpoint(tmp_path, 4)
    for path in files_of(make_checkpoint(tmp_path, 6)):
        folder = make_checkpoint(tmp_path, 6)
        DAMAGE[way](path)
        chosen, [(passed_over, reason)] = newest_whole(tmp_path, RUN)
        assert (chosen, passed_over) == (older, folder)
        file = path.relative_to(folder).as_posix()
        is_manifest = file == MANIFEST_FILE
        assert ("manifest" if is_manifest and way == "deleted" else file) in reason
        shutil.rmtree(folder)


@pytest.mark.parametrize("flips", [100, pytest.param(1000, marks=pytest.mark.torture)])
def test_every_flipped_bit_is_noticed(tmp_path, flips):
    rng = random.Random(flips)
    older = make_checkpoint(tmp_path, 4)
    folder = make_checkpoint(tmp_path, 6)
    files = files_of(folder)
    for index in range(flips):
        path = files[index % len(files)]
        whole = path.read_bytes()
        flip_a_bit(path, rng)
        chosen, [(_, reason)] = newest_whole(tmp_path, RUN)
        assert chosen == older
        assert path.relative_to(folder).as_posix() in reason
        path.write_bytes(whole)
    assert newest_whole(tmp_path, RUN) == (folder, [])


@pytest.mark.parametrize("verify", [True, False])
def test_a_mistyped_word_is_no_damaged_checkpoint(tmp_path, verify):
    with pytest.raises(CheckpointError, match=r"there is no folder 'atuo'; .* true or auto"):
        check_named("atuo", tmp_path, verify)


def test_a_flipped_bit_is_not_looked_for_without_verification(tmp_path):
    folder = make_checkpoint(tmp_path, 4)
    flip_a_bit(folder / "optimizer.pt", random.Random(0))
    assert newest_whole(tmp_path, RUN, verify=False)[0] == folder


def test_checkpoints_of_other_runs_are_passed_over_if_a_run_is_named(tmp_path):
    own = make_checkpoint(tmp_path, 4)
    other = make_checkpoint(tmp_path, 6, run_id="run-b")
    assert newest_whole(tmp_path, None) == (other, [])
    chosen, [(folder, reason)] = newest_whole(tmp_path, RUN)
    assert (chosen, folder, reason) == (own, other, "it belongs to another run, run-b")
    assert recorded_run_id(other) == "run-b"


def test_checkpoints_that_no_run_can_go_on_from_are_passed_over(tmp_path):
    model_only = {"model.safetensors": CONTENTS["model.safetensors"]}
    make_checkpoint(tmp_path, 8, contents=model_only)
    make_checkpoint(tmp_path, 2).rename(tmp_path / "checkpoint-6")
    (make_checkpoint(tmp_path, 4) / MANIFEST_FILE).unlink()
    chosen, passed_over = newest_whole(tmp_path, RUN)
    assert chosen is None
    assert [reason.split(":")[0] for _, reason in passed_over] == [
        "it has only a model, as save_only_model was set",
        "it is the checkpoint of step 2, under another name",
        "it has no manifest",
    ]


def test_one_line_says_which_were_passed_over(tmp_path, caplog):
    make_checkpoint(tmp_path, 2)
    (make_checkpoint(tmp_path, 4) / "scheduler.pt").unlink()
    DAMAGE["emptied"](make_checkpoint(tmp_path, 6) / "optimizer.pt")
    with caplog.at_level(logging.WARNING):
        report_passed_over(*newest_whole(tmp_path, RUN))
    assert [record.message for record in caplog.records] == [
        f"Passed over {tmp_path}/checkpoint-6: optimizer.pt is empty instead of 2,100 bytes long; "
        f"{tmp_path}/checkpoint-4: scheduler.pt is missing; "
        "the run resumes from checkpoint-2 instead."
    ]


def test_the_folder_of_a_run_in_place_of_a_checkpoint_is_refused_with_one_in_it(tmp_path):
    inside = make_checkpoint(tmp_path, 4)
    with pytest.raises(CheckpointError, match=f"name one in it, such as '{inside}'"):
        check_named(tmp_path, tmp_path)


def test_a_damaged_checkpoint_that_is_named_is_refused_with_an_older_one(tmp_path):
    older = make_checkpoint(tmp_path, 4)
    folder = make_checkpoint(tmp_path, 6)
    check_named(folder, tmp_path)
    flip_a_bit(folder / "optimizer.pt", random.Random(0))
    with pytest.raises(CheckpointError) as error:
        check_named(folder, tmp_path)
    assert "optimizer.pt has changed" in str(error.value)
    assert f"name {str(older)!r}, which is whole" in str(error.value)
    check_named(folder, tmp_path, verify=False)
    DAMAGE["truncated"](older / "optimizer.pt")
    with pytest.raises(CheckpointError, match="name another one"):
        check_named(folder, tmp_path)


def test_a_named_checkpoint_without_a_manifest_is_taken_unchecked(tmp_path):
    folder = make_checkpoint(tmp_path, 4)
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointError, match="verify_checkpoint: false"):
        check_named(folder, tmp_path)
    check_named(folder, tmp_path, verify=False)
    (folder / "trainer_state.json").write_text('{"global')
    for verify in (True, False):
        with pytest.raises(CheckpointError, match="name another one"):
            check_named(folder, tmp_path, verify=verify)


def test_the_best_checkpoint_must_be_whole(tmp_path):
    best = make_checkpoint(tmp_path, 2)
    check_best(best)
    flip_a_bit(best / "model.safetensors", random.Random(0))
    with pytest.raises(CheckpointError) as error:
        check_best(best)
    for part in (str(best), "model.safetensors has changed", "load_best_model_at_end: false"):
        assert part in str(error.value)
