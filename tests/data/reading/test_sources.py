"""The same pairs from every kind of source, and errors that name it."""

from __future__ import annotations

import datasets
import pytest

from dpofast.data import load_preferences
from dpofast.errors import DataError
from tests.data.builders import write_rows

ROWS = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "five, or\nsix"},
    {"prompt": "The sky", "chosen": "42", "rejected": "true"},
]
EXPECTED = [{"row": index, **row} for index, row in enumerate(ROWS)]


def write(path, rows=ROWS):
    return write_rows(path, rows)


def test_datasets_and_lists():
    dataset = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": dataset, "test": dataset.select([1])})
    assert load_preferences(ROWS).to_list() == EXPECTED
    assert load_preferences(dataset).to_list() == EXPECTED
    assert load_preferences(dataset.with_format("numpy")).to_list() == EXPECTED
    assert load_preferences(splits).to_list() == EXPECTED
    assert len(load_preferences(splits, split="test")) == 1


def test_a_folder_of_files(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "b.parquet", ROWS[1:])
    (tmp_path / ".hidden.json").write_text("{")
    (tmp_path / "README.md").write_text("about")
    assert load_preferences(tmp_path).to_list() == EXPECTED


def test_a_folder_with_splits(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", ROWS[:1])
    write(tmp_path / "train-00001-of-00002.parquet", ROWS[1:])
    write(tmp_path / "test-00000-of-00001.parquet", ROWS[:1])
    assert load_preferences(tmp_path).to_list() == EXPECTED
    assert len(load_preferences(tmp_path, split="test")) == 1
    with pytest.raises(DataError, match=r"no files of the split 'validation' \(found: test, train"):
        load_preferences(tmp_path, split="validation")


def test_saved_datasets(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    assert load_preferences(tmp_path / "one").to_list() == EXPECTED
    assert load_preferences(tmp_path / "splits").to_list() == EXPECTED
    with pytest.raises(DataError, match="no split 'test'"):
        load_preferences(tmp_path / "splits", split="test")


def test_a_hub_name(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_preferences("owner/pairs", split="train[:2]", config_name="small")
    assert loaded.to_list() == EXPECTED
    assert asked == [("owner/pairs", "small", "train[:2]")]


def test_a_hub_name_that_cannot_be_reached(monkeypatch):
    def load_dataset(name, config, split, streaming):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"owner/pairs is no file here.*no network"):
        load_preferences("owner/pairs")


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl\?"):
        load_preferences(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl\?"):
        load_preferences(tmp_path / "train.json")
    with pytest.raises(DataError, match="check the path"):
        load_preferences(tmp_path / "test.jsonl")
    with pytest.raises(DataError, match="nor the folder"):
        load_preferences(tmp_path / "nowhere" / "train.jsonl")


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no data file"):
        load_preferences(tmp_path)


@pytest.mark.parametrize("source", [{"train": ROWS}, 7, None, iter(ROWS), [ROWS], [[1]]])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(DataError, match="expected a"):
        load_preferences(source, name="pairs")


def test_a_stream_is_read_to_its_end():
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    assert load_preferences(stream).to_list() == EXPECTED


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="train holds no rows"):
        load_preferences([], name="train")


def test_a_missing_split_lists_those_there_are():
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    with pytest.raises(DataError, match=r"no split 'test' \(found: train\)"):
        load_preferences(splits, split="test")
