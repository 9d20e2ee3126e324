"""The output folder is made, and tried, before anything is loaded."""

from __future__ import annotations

import errno
import tempfile

import pytest

from dpofast.errors import ConfigError
from dpofast.options.output_dir import make_output_dir, refuse_inputs_folder


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


@pytest.mark.parametrize(
    ("given", "relation"),
    [
        ("model", "is"),
        ("model/", "is"),
        ("link", "is"),
        ("runs/../model", "is"),
        ("model/run", "is inside"),
        ("link/runs/new", "is inside"),
    ],
)
def test_a_folder_that_the_run_reads_from_is_refused(tmp_path, monkeypatch, given, relation):
    (tmp_path / "model").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    inputs = {"ref_model": "hub/name", "no adapter": None, "the model": tmp_path / "model"}
    expected = (
        rf"^run.yaml: output_dir: '{given}' {relation} the folder of the model \('.*/model'\)"
    )
    with pytest.raises(ConfigError, match=expected):
        refuse_inputs_folder(given, inputs, "run.yaml")
    assert [path.name for path in (tmp_path / "model").iterdir()] == []


def test_inputs_inside_the_output_folder_and_beside_it_are_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    inside = {"the model": "run/checkpoint-4", "reference_store": tmp_path / "run" / "store"}
    refuse_inputs_folder("run", inside)
    refuse_inputs_folder("model-2", {"the model": "model"})
    refuse_inputs_folder("run", {"the model": "", "ref_model": "gpt2"})
