"""The file that says which run an output folder belongs to."""

from __future__ import annotations

import json

import pytest

from dpofast.errors import CheckpointError
from dpofast.train.checkpoint.run_id import RUN_FILE, new_run, read_run, take_over, write_run


def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path):
    assert read_run(tmp_path) is None
    first, second = new_run(), new_run()
    assert first.run != second.run
    for run in (first, second):
        write_run(tmp_path, run)
        assert read_run(tmp_path) == run
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]
    assert json.loads((tmp_path / RUN_FILE).read_text()) == {
        "run": second.run,
        "started": second.started,
        "format": 1,
    }


def test_a_folder_is_taken_over_from_another_run_only(tmp_path):
    take_over(tmp_path, "a" * 32)  # the folder of no run
    assert read_run(tmp_path) is None
    own = new_run()
    write_run(tmp_path, own)
    take_over(tmp_path, own.run)
    assert read_run(tmp_path) == own
    for _ in range(2):
        take_over(tmp_path, "b" * 32)
        assert read_run(tmp_path).run == "b" * 32
        (tmp_path / RUN_FILE).write_text("damaged")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "can't be read"),
        ('{"run": "ab", "star', "can't be read"),
        ("[]", "can't be read"),
        ('{"run": 7, "started": "", "format": 1}', "7 is no id"),
        ('{"run": "../..", "started": "", "format": 1}', "is no id"),
        ('{"run": "ab", "started": "", "format": 2}', "newer version of dpofast"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, message):
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        read_run(tmp_path)
    assert str(tmp_path / RUN_FILE) in str(error.value)
