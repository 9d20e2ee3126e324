"""Every row that docs/data.md shows can be read, and every error there is what such a row gets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest

from dpofast.data import (
    data_kind,
    load_preferences,
    load_unpaired,
    tokenize_preferences,
    tokenize_ranked,
    tokenize_unpaired,
)
from dpofast.errors import DataError
from tests.data.builders import CHAT_TEMPLATE, byte_bpe

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
_ALL_ROWS = [
    json.loads(line)
    for block in re.findall(r"```json\n(.*?)```", PAGE, re.S)
    for line in block.splitlines()
]
UNPAIRED_ROWS = [row for row in _ALL_ROWS if data_kind([row]) == "unpaired"]
RANKED_ROWS = [row for row in _ALL_ROWS if data_kind([row]) == "ranked"]
ROWS = [row for row in _ALL_ROWS if data_kind([row]) == "paired"]
BROKEN_FILES = {
    "pairs.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n'
    '{"prompt": "a", "chosen": 4, "rejected": "c"}\n',
    "pairs.json": "[\n{}" + ",\n{}" * 6 + ',\n{"prompt": 1 "a"}]',
    "pairs.csv": "prompt,chosen\na,b\n",
}


def test_every_row_on_the_page_can_be_read():
    tokenizer = byte_bpe(chat_template=CHAT_TEMPLATE)
    assert (len(ROWS), len(RANKED_ROWS), len(UNPAIRED_ROWS)) == (20, 4, 7)
    for row, num_pairs in zip(RANKED_ROWS, (5, 2, 2, 3), strict=True):
        pairs, _ = tokenize_ranked(load_preferences([row]), tokenizer, max_length=None)
        assert len(pairs) == num_pairs, row
    for row in UNPAIRED_ROWS:
        rows, _ = tokenize_unpaired(load_unpaired([row]), tokenizer, max_length=None)
        assert len(rows) == 1, row
    for row in ROWS:
        pairs, _ = tokenize_preferences(load_preferences([row]), tokenizer, max_length=None)
        rejected = row.get("rejected")
        several = isinstance(rejected, list) and not isinstance(rejected[0], dict)
        assert len(pairs) == (len(rejected) if several else 1), row


def test_every_error_on_the_page_is_what_such_a_file_gets(tmp_path):
    for name, content in BROKEN_FILES.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError) as caught:
            load_preferences(tmp_path / name)
        assert str(caught.value).removeprefix(f"{tmp_path}/") in PAGE.splitlines()


def test_the_example_with_many_answers_prints_what_it_says(capsys):
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (example,) = (code for code in examples if '"pairs"]' in code)
    exec(example, {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"\)  # (.*)", example)


def test_the_errors_about_rows_with_many_answers_are_those_on_the_page(tmp_path):
    answers = '{"prompt": "a", "completions": ["b", "c", "d"]'
    lines = f'{answers}, "scores": [7, 7, 7]}}\n{answers}, "preferences": [[0, 1], [0, 3]]}}\n'
    (tmp_path / "ranked.jsonl").write_text(lines)
    with pytest.raises(DataError) as caught:
        load_preferences(tmp_path / "ranked.jsonl")
    _, *errors = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert {error.strip() for error in errors} <= set(PAGE.splitlines())
    assert len(errors) == 2


def test_the_errors_about_the_kind_of_rows_are_those_on_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for load, name in ((load_preferences, "rows.jsonl"), (load_unpaired, "pairs.jsonl")):
        with pytest.raises(DataError) as caught:
            load(name)
        assert str(caught.value) in PAGE.splitlines()


def test_the_error_from_tokenising_is_the_one_on_the_page():
    rows = [{"prompt": "a" * (row != 17), "chosen": "b", "rejected": "c"} for row in range(18)]
    with pytest.raises(DataError) as caught:
        tokenize_preferences(load_preferences(rows), byte_bpe(), max_length=None)
    (line,) = [line for line in PAGE.splitlines() if line.startswith("train, row 17")]
    assert str(caught.value).startswith(line.removesuffix("..."))


def test_the_list_of_generation_prompts_is_where_the_page_says():
    path, name = "dpofast/data/reading/implicit.py", "GENERATION_PROMPTS"
    assert re.search(rf"`{name}` in\s+`{path}`", PAGE)
    assert f"\n{name} = (" in (Path(__file__).parents[2] / path).read_text(encoding="utf-8")


def test_the_examples_for_datasets_of_objects_make_ranked_rows(tmp_path, monkeypatch):
    (example,) = (
        code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "nectar" in code
    )
    answers = [{"model": "a", "response": "x", "overall_score": 8.5, "annotations": {"b": "c"}}]
    answers.append({**answers[0], "response": "y", "overall_score": 9.0})
    ultrafeedback = {"instruction": "q", "models": ["a", "b"], "completions": answers}
    ranked = [
        {"answer": "x", "model": "a", "rank": 2.0},
        {"answer": "y", "model": "b", "rank": 1.0},
    ]
    nectar = {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": ranked, "turns": 1}
    for row in (ultrafeedback, nectar):
        with pytest.raises(DataError, match="completions"):
            load_preferences([row])
    sets = {
        name: datasets.Dataset.from_list([row])
        for name, row in (("ultrafeedback", ultrafeedback), ("nectar", nectar))
    }
    monkeypatch.chdir(tmp_path)
    exec(example, sets)
    for source in (sets["ultrafeedback"], sets["nectar"], "nectar.jsonl"):
        (row,) = load_preferences(source)
        assert (row["pairs"], len(row["completions"])) == ([[1, 0]], 2)
