"""Generated files have what tests and benchmarks rely on, and are reported as generated."""

from __future__ import annotations

import hashlib
import json

import pytest

import benchmarks.data
from benchmarks.data import find_data, generate, race_tokenizer, training_texts
from dpofast.data import load_preferences, tokenize_preferences
from dpofast.errors import DataError


@pytest.fixture
def nothing_real(monkeypatch, tmp_path):
    """A machine without the real files; generated files go to `tmp_path`."""
    monkeypatch.delenv("DPOFAST_DATA", raising=False)
    monkeypatch.setattr(benchmarks.data, "REPOSITORY", tmp_path / "repository")
    monkeypatch.setattr(benchmarks.data, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_without_real_files_they_are_generated_once(nothing_real):
    path, source = find_data("instruction_preference")
    assert source == "generated"
    written = path.stat().st_mtime_ns
    assert find_data("instruction_preference") == (path, "generated")
    assert path.stat().st_mtime_ns == written


def test_real_files_are_found_where_they_are(nothing_real, monkeypatch):
    for place in ("shared/data", "named", "given"):
        (nothing_real / place).mkdir(parents=True)
        (nothing_real / place / "kto_en_demo.json").write_text("[]")
    found = nothing_real / "shared" / "data" / "kto_en_demo.json"
    assert find_data("kto_en_demo") == (found, "file")
    monkeypatch.setenv("DPOFAST_DATA", str(nothing_real / "named"))
    assert find_data("kto_en_demo")[0].parent.name == "named"
    assert find_data("kto_en_demo", nothing_real / "given")[0].parent.name == "given"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no data named 'mmlu'"):
        find_data("mmlu")


def test_generating_again_gives_the_same_bytes(tmp_path):
    first, second = (generate("dpo_en_demo", tmp_path / place) for place in ("a", "b"))
    assert hashlib.sha256(first.read_bytes()).digest() == (
        hashlib.sha256(second.read_bytes()).digest()
    )


@pytest.mark.slow
def test_generated_conversations(tmp_path):
    path = generate("dpo_en_demo", tmp_path)
    tokenizer = race_tokenizer(path)
    assert len(tokenizer) == 16_000
    _, report = tokenize_preferences(load_preferences(path), tokenizer, max_length=None)
    assert (report.pairs_read, report.pairs_kept) == (300, 300)
    # Within a tenth of the real file's lengths with its own tokenizer.
    assert report.prompt_lengths.percentiles[50] == pytest.approx(181, rel=0.1)
    assert report.prompt_lengths.longest == pytest.approx(3_650, rel=0.1)
    assert report.answer_lengths.percentiles[50] == pytest.approx(323, rel=0.1)
    assert report.answer_lengths.longest == pytest.approx(985, rel=0.1)
    turns = {len(row["conversations"]) for row in json.loads(path.read_text())}
    assert {1, 2, 5, 7} <= turns


def test_generated_instructions(tmp_path):
    path = generate("instruction_preference", tmp_path)
    tokenizer = race_tokenizer(path, 4_000)
    pairs, report = tokenize_preferences(load_preferences(path), tokenizer, max_length=None)
    assert report.pairs_read == 1_100
    assert report.left_out == {"identical answers": (122, 226, 400, 566, 628, 676)}
    shared = [pair for pair in pairs if pair["chosen_ids"][0] == pair["rejected_ids"][0]]
    assert len(shared) > len(pairs) / 2, "the answers of many pairs begin alike"


def test_generated_unpaired_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="KTO"):
        load_preferences(generate("kto_en_demo", tmp_path))


def test_training_texts_are_all_texts(tmp_path):
    path = tmp_path / "a.json"
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    path.write_text(json.dumps(rows))
    assert list(training_texts(path)) == ["a", "b", "c"]
    rows = [{"instruction": "i", "input": "", "chosen": "d", "rejected": "e"}]
    path.write_text(json.dumps(rows))
    assert list(training_texts(path)) == ["i", "d", "e"]
