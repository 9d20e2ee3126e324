"""What may be published of a name: hub ids and file names, never a path or who ran it."""

from __future__ import annotations

import pytest

from dpofast.monitor.public_names import hub_id, public_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model-1.5", "org/model-1.5"),
        ("gpt2", "gpt2"),
        ("hf://datasets/org/pairs@0a1b/data/train.parquet", "org/pairs"),
        ("hf://datasets/imdb@0a1b/train.parquet", "imdb"),
        ("/home/me/.cache/huggingface/hub/models--org--model/snapshots/0a1b", "org/model"),
        ("/cache/hub/models--gpt2/snapshots/0a1b/", "gpt2"),
        ("/cache/hub/datasets--org--some-pairs/snapshots/0a1b/train.jsonl", "org/some-pairs"),
        ("/home/me/model", None),
        ("~/model", None),
        ("../model", None),
        ("a/b/c", None),
        ("data/pairs.jsonl", None),
        ("pairs.parquet", None),
        ("", None),
        (None, None),
        ("x" * 5000, None),
    ],
)
def test_hub_ids(name, expected):
    assert hub_id(name) == expected


def test_a_folder_on_this_disk_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/sft") == "runs/sft"
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    assert hub_id("runs/sft") is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/quux/pairs.jsonl", "pairs.jsonl"),
        ("runs/qwen-dpo/", "qwen-dpo"),
        ("/home/quux", None),
        ("runs/Quux_run-3", None),
        ("runs/quuxly", "quuxly"),
        ("runs/on-bighost.2", None),
        ("", None),
        (None, None),
    ],
)
def test_names_of_files_and_folders(monkeypatch, path, expected):
    monkeypatch.setenv("LOGNAME", "quux")
    monkeypatch.setattr("platform.node", lambda: "bighost.example.org")
    assert public_name(path) == expected


def test_a_user_without_a_name(monkeypatch):
    def nameless():
        raise KeyError("uid not found: 1000")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert public_name("/data/pairs.jsonl") == "pairs.jsonl"
