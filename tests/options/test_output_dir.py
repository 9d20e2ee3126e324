"""The output folder is made, and tried, before anything is loaded."""

from __future__ import annotations

import errno
import tempfile

import pytest

from dpofast.errors import ConfigError
from dpofast.options.output_dir import make_output_dir


def test_a_new_folder_is_made_and_stays_empty(tmp_path):
    make_output_dir(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_what_cannot_be_made_is_named_with_its_source(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^run.yaml: output_dir: '.*file/run' can't be made: "):
        make_output_dir(tmp_path / "file" / "run", "run.yaml")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_a_folder_that_takes_no_file(tmp_path, monkeypatch, number):
    def fail(**kwargs):
        raise OSError(number, "no file here")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(ConfigError, match=r"^output_dir: no file can be written .*: no file here"):
        make_output_dir(tmp_path)
