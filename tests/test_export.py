"""Exported files keep the user's rows, add the store's log-probs, and train as the store would."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset

from dpofast.data import load_preferences, tokenize_preferences
from dpofast.demo.model import make_tokenizer
from dpofast.errors import ConfigError, DataError, MissingRowsError
from dpofast.export import Source, export_pairs
from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.builder import BuildOptions, build_reference, reference_logps
from dpofast.reference.store.store import ReferenceStore
from tests.reference.stubs import StubScorer, batches_of, identity
from tests.support import make_trainer, token_pairs, train

ENDINGS = [".parquet", ".jsonl", ".json"]
WORDS = ("one", "two", "three", "four", "five", "six")
TEXTS = [
    {"id": 7 * number, "prompt": f"Say {word} — ", "chosen": word, "rejected": f"{word}, ok"}
    for number, word in enumerate(WORDS)
]
MESSAGES = [
    {
        "source": {"name": "web", "year": number} if number % 2 else {"name": "ünï"},
        "chosen": [
            {"role": "user", "content": f"Say {word}."},
            {"role": "assistant", "content": word},
        ],
        "rejected": [
            {"role": "user", "content": f"Say {word}."},
            {"role": "assistant", "content": "no"},
        ],
    }
    for number, word in enumerate(WORDS)
]
IDS = [
    {"prompt_ids": [1, number], "chosen_ids": [2, 3], "rejected_ids": [number + 4]}
    for number in range(6)
]


@pytest.fixture
def folder(tmp_path):
    """A folder for the files; the store is beside it."""
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def tokenised(source, tokenizer, max_length=None):
    return tokenize_preferences(source.pairs(), tokenizer, max_length=max_length)


def namespace_of(folder, tokens=None):
    namespace = ReferenceStore.open(folder / "store", create=True).namespace(identity())
    if tokens is not None:
        options = BuildOptions(progress=False)
        answers = read_answers(tokens)
        build_reference(namespace, answers, StubScorer(), batches=batches_of(4), options=options)
    return namespace


def export(path, source, tokenizer):
    """Export all pairs, and return the store's log-probs, [n, 2]."""
    tokens, report = tokenised(source, tokenizer)
    namespace = namespace_of(path.parent.parent, tokens)
    assert export_pairs(path, source, tokens, report, namespace) == len(tokens)
    return reference_logps(namespace, read_answers(tokens))


def rows_of(path):
    """Read the file as Hugging Face's datasets does."""
    kind = "parquet" if path.suffix == ".parquet" else "json"
    return load_dataset(kind, data_files=str(path), split="train", cache_dir=path.parent / "cache")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("rows", [TEXTS, MESSAGES, IDS], ids=["texts", "messages", "ids"])
def test_rows_keep_columns_order_and_values(folder, tokenizer, ending, rows):
    path = folder / f"pairs{ending}"
    logps = export(path, Source(rows), tokenizer)
    found = rows_of(path)
    assert found.column_names == [*rows[0], "ref_chosen_logps", "ref_rejected_logps"]
    assert found.features["ref_chosen_logps"] == Value("float64")
    for row, given, of_pair in zip(found, rows, logps, strict=True):
        own = [row.pop("ref_chosen_logps"), row.pop("ref_rejected_logps")]
        # datasets rounds the numbers of some JSON files; our own reader, below, never does
        np.testing.assert_allclose(own, of_pair, rtol=0 if ending == ".parquet" else 1e-9)
        if rows is MESSAGES and ending == ".parquet":
            given = {**given, "source": {"name": None, "year": None, **given["source"]}}
        assert row == given
    again = load_preferences(str(path))
    columns = [again["ref_chosen_logps"], again["ref_rejected_logps"]]
    np.testing.assert_array_equal(np.stack(columns, 1), logps)
    assert sorted(name.name for name in folder.iterdir()) == ["cache", path.name]


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_a_run_on_the_file_trains_bit_for_bit_as_one_on_the_store(folder, ending):
    rows = token_pairs(10)
    rows = [*rows, {**rows[0], "rejected_ids": rows[0]["chosen_ids"]}]  # left out by both
    stored = make_trainer(folder.parent, pairs=rows)
    expected = train(stored)
    assert stored.reference.store.totals().rows_scored > 0
    path = folder / f"pairs{ending}"
    report, namespace = stored.train_set().report, stored.reference.store.namespace
    assert export_pairs(path, Source(rows), stored.train_dataset, report, namespace) == 10
    pairs = load_preferences(str(path))
    exported = make_trainer(
        folder.parent, pairs=pairs, options={"reference_store": str(folder / "other")}
    )
    assert train(exported) == expected
    assert exported.reference.store.totals() is None
    assert stored.train_dataset["chosen_ids"] == exported.train_dataset["chosen_ids"]


def test_json_keeps_rows_that_have_different_fields(folder, tokenizer):
    path = folder / "pairs.jsonl"
    rows = [{**TEXTS[0], "note": 1}, {**TEXTS[1], "note": ["two"]}, {**TEXTS[2]}]
    (folder / "given.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Source(str(folder / "given.jsonl"))
    logps = export(path, source, tokenizer).tolist()
    written = [json.loads(line) for line in path.read_text().splitlines()]
    names = ("ref_chosen_logps", "ref_rejected_logps")
    assert written == [
        {**row, **dict(zip(names, of_pair, strict=True))}
        for row, of_pair in zip(rows, logps, strict=True)
    ]
    with pytest.raises(DataError, match=r"can't be written as Parquet .*write \.jsonl"):
        export(folder / "pairs.parquet", source, tokenizer)
    assert not (folder / "pairs.parquet").exists()


@pytest.mark.parametrize("as_file", [False, True])
def test_a_dataset_and_a_parquet_file_keep_their_types(folder, tokenizer, as_file):
    features = {
        **dict.fromkeys(("prompt", "chosen", "rejected"), Value("large_string")),
        "label": ClassLabel(names=["a", "b"]),
        "score": Value("float32"),
    }
    rows = [{**row, "label": 1, "score": 0.1} for row in TEXTS]
    for row in rows:
        del row["id"]
    dataset = Dataset.from_list(rows, Features(features)).select([5, 0, 3])
    path = folder / "pairs.parquet"
    dataset.to_parquet(folder / "given.parquet")
    export(path, Source(folder / "given.parquet" if as_file else dataset), tokenizer)
    found = rows_of(path)
    expected = {
        **features,
        **dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), Value("float64")),
    }
    assert found.features == Features(expected)
    assert found["prompt"][:] == [TEXTS[place]["prompt"] for place in (5, 0, 3)]
    assert pa.parquet.read_schema(path).field("score").type == pa.float32()


def test_pairs_that_a_run_leaves_out_are_left_out(folder, tokenizer):
    rows = [dict(row) for row in TEXTS]
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[4]["rejected"] = rows[4]["chosen"]
    path = folder / "pairs.jsonl"
    logps = export(path, Source(rows), tokenizer)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in written] == [0, 14, 21, 35]
    assert [row["ref_rejected_logps"] for row in written] == logps[:, 1].tolist()


def test_a_column_row_of_the_source_s_own(folder, tokenizer):
    rows = [{**row, "row": 100 - place} for place, row in enumerate(TEXTS)]
    rows[2]["rejected"] = rows[2]["chosen"]
    path = folder / "pairs.jsonl"
    logps = export(path, Source(rows), tokenizer)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["row"] for row in written] == [100, 99, 97, 96, 95]
    assert [row["ref_chosen_logps"] for row in written] == logps[:, 0].tolist()
    twice = Source([{**row, "row": 3} for row in TEXTS])
    with pytest.raises(DataError, match="Two pairs have the same row number"):
        export(path, twice, tokenizer)


def test_other_names_of_columns_stay(folder, tokenizer):
    rows = [{"question": row["prompt"], **row, "prompt": "?"} for row in TEXTS]
    path = folder / "pairs.parquet"
    export(path, Source(rows, columns={"prompt": "question"}), tokenizer)
    assert [row["question"] for row in rows_of(path)] == [row["prompt"] for row in TEXTS]


def test_missing_rows_are_named_and_nothing_is_written(folder, tokenizer):
    source = Source(TEXTS)
    tokens, report = tokenised(source, tokenizer)
    namespace = namespace_of(folder.parent, tokens.select(range(4)))
    path = folder / "pairs.jsonl"
    path.write_text("mine")
    with pytest.raises(MissingRowsError, match=r"lacks 4 of 12.*row 4 .*dpofast ref build"):
        export_pairs(path, source, tokens, report, namespace)
    assert path.read_text() == "mine"


def test_cut_answers_are_refused(folder, tokenizer):
    source = Source(TEXTS)
    longest = max(tokenised(source, tokenizer)[1].sequence_lengths.longest, 3)
    tokens, report = tokenised(source, tokenizer, max_length=longest - 1)
    assert report.tokens_cut
    namespace = namespace_of(folder.parent, tokens)
    with pytest.raises(DataError, match="answers and 0 prompts were cut to max_length"):
        export_pairs(folder / "pairs.jsonl", source, tokens, report, namespace)


def test_log_probs_that_are_there_already_are_refused(folder, tokenizer):
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in TEXTS]
    with pytest.raises(DataError, match="'ref_chosen_logps' already"):
        export(folder / "pairs.jsonl", Source(rows), tokenizer)


def test_a_format_that_changes_a_pair_is_refused(folder, tokenizer):
    """Arrow turns 1 into 1.0 if 0.5 is in the same field, and a chat template would show that."""
    calls = [{"id": 1, "arguments": {"a": 1}}, {"id": 2, "arguments": {"a": 0.5, "b": [2]}}]
    rows = [
        {
            "prompt": [{"role": "user", "content": word}],
            "chosen": [{"role": "assistant", "content": word, "call": calls[place % 2]}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for place, word in enumerate(WORDS)
    ]
    source = Source(rows)
    export(folder / "pairs.jsonl", source, tokenizer)
    with pytest.raises(DataError, match=r"would read back as another pair.*write \.jsonl"):
        export(folder / "pairs.parquet", source, tokenizer)
    assert not list(folder.glob("*.parquet"))
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pairs.csv", r"expected a name that ends in one of \.parquet, \.jsonl"),
        ("pairs", "expected a name that ends in"),
        ("nowhere/pairs.json", "no folder .*nowhere"),
        ("given.jsonl", "is the file that the pairs are read from"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(folder, tokenizer, name, message):
    (folder / "given.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    with pytest.raises(ConfigError, match=message):
        export(folder / name, Source(str(folder / "given.jsonl")), tokenizer)
