"""A stream that is read in pieces gives the pairs and the report of a list of the same rows."""

from __future__ import annotations

import json
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pytest

from dpofast.data import PairStream, TokenStream, load_preferences, tokenize_preferences
from dpofast.data.reading.answer_pairs import answer_pairs_of
from dpofast.data.tokens.report import PERCENTILES, Lengths
from dpofast.data.tokens.truncate import LengthLimits
from dpofast.errors import ConfigError, DataError
from tests.data.builders import CHAT_TEMPLATE, byte_bpe
from tests.data.test_docs import ROWS as FORMS

TOKENIZER = byte_bpe(chat_template=CHAT_TEMPLATE)
LIMITS = LengthLimits(24, "keep_end")


def token_stream(source, name="train", *, columns=None, roles=None, **options):
    stream = PairStream(source, columns=columns, roles=roles, name=name)
    return TokenStream(stream, TOKENIZER, **{"limits": LIMITS, "name": name, **options})


def in_pieces(tokens, num_rows):
    """All kept pairs of a pass, as a list of dicts."""
    pairs = []
    while not tokens.ended:
        pairs += tokens.read(num_rows).pairs.to_list()
    return pairs


def streams_of(rows):
    """The rows as streams of every kind, and whether structs of Arrow have filled in nulls."""

    class Plain:
        def __iter__(self):
            return iter(rows)

    torch = pytest.importorskip("torch")
    plain = type("Stream", (Plain, torch.utils.data.IterableDataset), {})()
    generated = datasets.IterableDataset.from_generator(lambda: iter(rows))
    return {"generator": generated, "mapped": generated.map(lambda row: row), "torch": plain}


@pytest.mark.parametrize("index", range(len(FORMS)))
def test_every_form_gives_the_tokens_and_the_report_of_a_list(index):
    rows = [FORMS[index], *({**FORMS[index], "extra": n} for n in range(3))]
    expected, report = tokenize_preferences(rows, TOKENIZER, **vars(LIMITS))
    sources = streams_of(rows)
    for kind in sources if index == 0 else ["torch"]:
        tokens = token_stream(sources[kind])
        assert in_pieces(tokens, 3) == expected.to_list(), kind
        assert tokens.report() == report, kind


def test_nulls_of_structs_are_left_out_of_all_streams_that_come_from_arrow(tmp_path):
    one = [{"role": "user", "content": "a"}]
    two = [{"role": "user", "content": "b", "name": "B"}]
    answer = [{"role": "assistant", "content": "c"}]
    other = [{"role": "assistant", "content": "d"}]
    rows = [{"prompt": p, "chosen": answer, "rejected": other} for p in (one, two) * 3]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    stream = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "rows.parquet"), split="train", streaming=True
    )
    arrow = datasets.Dataset(pa.Table.from_pylist(rows))
    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    tokenizer = byte_bpe(chat_template=template)
    expected, report = tokenize_preferences(arrow, tokenizer, max_length=None)
    assert report.nulls_left_out
    sources = (
        stream,
        stream.map(lambda row: row),
        stream.with_format("numpy"),
        datasets.concatenate_datasets([stream.take(4), stream.skip(4)]),
        arrow.to_iterable_dataset(),
    )
    for source in sources:
        tokens = TokenStream(PairStream(source), tokenizer, limits=LengthLimits(None))
        assert in_pieces(tokens, 4) == expected.to_list()
        assert tokens.report().nulls_left_out
    # Rows that never were in Arrow keep the nulls that somebody has written.
    given = {"role": "user", "content": "a", "name": None}
    rows = [{"prompt": [given], "chosen": answer, "rejected": other}]
    expected, _ = tokenize_preferences(rows, tokenizer, max_length=None)
    generated = datasets.IterableDataset.from_generator(lambda: iter(rows))
    tokens = TokenStream(PairStream(generated), tokenizer, limits=LengthLimits(None))
    assert in_pieces(tokens, 4) == expected.to_list()


def test_columns_of_json_keep_their_nulls(tmp_path):
    """load_dataset keeps messages whose fields differ as JSON."""
    message = {"role": "user", "content": "a", "name": None}
    rows = [
        {"prompt": [message], "chosen": "b", "rejected": "c"},
        {"prompt": [{"role": "user", "content": 1.5}], "chosen": "b", "rejected": "c"},
    ]
    features = {"prompt": datasets.Json(), **dict.fromkeys(("chosen", "rejected"), datasets.Value("string"))}  # fmt: skip # noqa: E501
    kept = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    records = list(PairStream(kept.to_iterable_dataset()).records())
    assert [record.values for record in records] == rows


def test_a_file_streams_by_its_lines_and_names_them(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"question": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    names = {"columns": {"prompt": "question"}}
    expected, _ = tokenize_preferences(load_preferences(path, **names), TOKENIZER, max_length=None)
    tokens = token_stream(path, **names, limits=LengthLimits(None))
    assert in_pieces(tokens, 2) == expected.to_list()
    tokens.start(epoch=1, row=3)
    assert in_pieces(tokens, 2) == expected.to_list()[3:]
    path.write_text(path.read_text().replace('"q3"', "3"))
    tokens.start(epoch=0, row=2)
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 4: prompt is not text but int 3"):
        in_pieces(tokens, 2)
    with pytest.raises(DataError, match="there is no file"):
        PairStream(tmp_path / "nothing.jsonl")
    with pytest.raises(ConfigError, match="columns names 'prmpt'"):
        PairStream(path, columns={"prmpt": "question"})


def test_a_hub_dataset_is_loaded_as_a_stream(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options))
        return datasets.Dataset.from_list(
            [{"prompt": "a", "chosen": "b", "rejected": "c"}]
        ).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = PairStream("owner/pairs", split="fine", config_name="small")
    for epoch in range(2):  # without asking the hub again
        assert [record.where for record in stream.records(epoch)] == [
            "owner/pairs, row 0 (counted from 0)"
        ]
    assert asked == [("owner/pairs", "small", {"split": "fine", "streaming": True})]


def test_a_stream_that_breaks_off_names_the_row():
    def rows():
        yield {"prompt": "a", "chosen": "b", "rejected": "c"}
        raise ConnectionError("no\nnetwork")

    tokens = token_stream(datasets.IterableDataset.from_generator(rows))
    with pytest.raises(DataError, match=r"train can't be read beyond row 0 \(.*: no network\)"):
        tokens.read(2)


def test_a_split_of_a_dict_is_streamed():
    splits = datasets.IterableDatasetDict(
        {
            name: datasets.Dataset.from_list(
                [{"prompt": name, "chosen": "a", "rejected": "b"}]
            ).to_iterable_dataset()
            for name in ("train", "test")
        }
    )
    assert [record.values["prompt"] for record in PairStream(splits).records()] == ["train"]
    assert load_preferences(splits, split="test")["prompt"][:] == ["test"]
    with pytest.raises(DataError, match=r"no split 'dev' \(found: train, test\)"):
        PairStream(splits, split="dev")


@pytest.mark.parametrize("how", [None, "adjacent"])
def test_rows_with_many_answers_become_pairs_as_they_are_read(how):
    rows = [
        {"prompt": f"q{n}", "completions": ["a", "b", "", "b", "dd"], "scores": [n, 1, 2, 1, 3]}
        for n in range(7)
    ]
    names = ("chosen", "rejected")
    pairs = [
        {"prompt": row["prompt"], "row": number}
        | {name: row["completions"][place] for name, place in zip(names, pair, strict=True)}
        for number, row in enumerate(rows)
        for pair in answer_pairs_of(row, 5, how).pairs
    ]
    expected, report = tokenize_preferences(pairs, TOKENIZER, **vars(LIMITS))
    ties = sum(answer_pairs_of(row, 5, how).ties for row in rows)
    assert ties
    stream = PairStream(streams_of(rows)["generator"], answer_pairs=how)
    tokens = TokenStream(stream, TOKENIZER, limits=LIMITS)
    assert in_pieces(tokens, 3) == expected.to_list()
    assert tokens.report() == replace(report, ties=ties)
    tokens.start(1, 3)
    assert in_pieces(tokens, 3) == [pair for pair in expected.to_list() if pair["row"] >= 3]
    assert tokens.report().ties == ties, "rows of the first pass count once"


def test_blank_rows_at_the_beginning_do_not_decide_the_form():
    rows = [{"prompt": "p", "chosen": "", "rejected": "b"}] * 3
    messages = [{"role": "user", "content": "hi"}]
    rows += [{"prompt": messages, "chosen": "yes", "rejected": "no"}] * 3
    expected, report = tokenize_preferences(rows, TOKENIZER, max_length=None)
    tokens = token_stream(streams_of(rows)["generator"], limits=LengthLimits(None))
    assert in_pieces(tokens, 2) == expected.to_list()
    assert tokens.report() == report


def test_a_pass_that_is_read_again_counts_only_rows_that_are_new():
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(6)]
    tokens = token_stream(streams_of(rows)["generator"])
    tokens.read(4)
    for epoch, row in ((0, 0), (1, 0), (0, 4)):
        tokens.start(epoch, row)
        in_pieces(tokens, 2)
    assert tokens.report().pairs_read == 6


@pytest.mark.parametrize("size", [1, 2, 3, 10, 100, 101, 1000])
def test_percentiles_are_those_of_numpy(size):
    lengths = np.random.default_rng(size).integers(1, 60, size)
    found = Lengths.of(dict(zip(*np.unique_counts(lengths), strict=True)))
    expected = np.percentile(lengths, PERCENTILES, method="higher")
    assert list(found.percentiles.values()) == expected.tolist()
    assert found.longest == lengths.max()
