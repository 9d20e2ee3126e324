"""The same token ids as TRL, unless a token would cross the boundary."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import datasets
import pytest

from benchmarks.data import find_data, race_tokenizer
from dpofast.data import load_preferences, tokenize_preferences
from tests.data.builders import byte_bpe, plain_rows

pytest.importorskip("trl", reason="needs the extra `bench`")

pytestmark = pytest.mark.peer
IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]


def tokenised_by_trl(dataset, tokenizer, max_length):
    """TRL's tokenised columns, made without a model: the method only reads `_tokenizer`."""
    from trl import DPOTrainer

    args = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start"
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    return DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo_en_demo", "instruction_preference"])
@pytest.mark.parametrize("form", ["messages", "text", "implicit"])
def test_ids_of_real_pairs(name, form):
    path = find_data(name)[0]
    tokenizer = copy.deepcopy(race_tokenizer(path))
    pairs = load_preferences(path)
    pairs = pairs.select(range(0, len(pairs), 2 if form == "messages" else 4))
    if form == "text":
        pairs = load_preferences([as_text(row) for row in plain_rows(pairs)])
    ours, report = tokenize_preferences(pairs, tokenizer, max_length=None)
    columns = ["prompt", "chosen", "rejected"]
    kept = set(ours["row"])
    theirs = plain(pairs).filter(lambda row: row["row"] in kept).select_columns(columns)
    if form == "implicit":
        theirs = theirs.map(as_whole, remove_columns="prompt")
        ours, report = tokenize_preferences(theirs, tokenizer, max_length=None)
    theirs = tokenised_by_trl(theirs, tokenizer, None).select_columns(IDS)
    assert len(theirs) == len(ours)
    differing = sum(
        one != other for one, other in zip(ours.select_columns(IDS), theirs, strict=True)
    )
    assert differing == report.boundary_merges
    assert differing <= 0.01 * len(ours)


def plain(pairs):
    """The pairs as TRL reads them, with messages in structs."""
    return datasets.Dataset.from_list(plain_rows(pairs))


def as_text(row):
    prompt = "\n".join(message["content"] for message in row["prompt"])
    answers = {c: " " + row[c][0]["content"] for c in ("chosen", "rejected")}
    return {"prompt": prompt + "\nAnswer:", **answers}


def as_whole(row):
    return {c: row["prompt"] + row[c] for c in ("chosen", "rejected")}


@pytest.mark.slow
def test_what_is_kept_under_a_limit_is_what_trl_keeps():
    path = find_data("dpo_en_demo")[0]
    tokenizer = copy.deepcopy(race_tokenizer(path))
    pairs = load_preferences(path)
    pairs = pairs.select(range(0, len(pairs), 2))
    ours, report = tokenize_preferences(pairs, tokenizer, max_length=256)
    theirs = tokenised_by_trl(plain(pairs).remove_columns("row"), tokenizer, 256)
    expected = [
        (row["prompt_ids"], *((row["prompt_ids"] + row[c])[:256] for c in IDS[1:]))
        for row in theirs
    ]
    found = [(row["prompt_ids"], *(row["prompt_ids"] + row[c] for c in IDS[1:])) for row in ours]
    assert report.left_out.keys() <= {"no room for an answer", "identical answers after the cut"}
    assert found == [row for row in expected if row[1] != row[2]]


DIFFERENCES = {
    "merge": (
        byte_bpe((("b", "c"),)),
        {"prompt": "ab", "chosen": "cd", "rejected": "x"},
        ("a", "bcd</s>"),
        ("ab", "cd</s>"),
    ),
    "bos in the text": (
        byte_bpe(bos=True),
        {"prompt": "<s>a", "chosen": "b", "rejected": "c"},
        ("<s><s>a", "b</s>"),
        ("<s>a", "b</s>"),
    ),
    "eos and a line break": (
        byte_bpe(),
        {"prompt": "a", "chosen": "b</s>\n", "rejected": "c</s>\n"},
        ("a", "b</s>\n</s>"),
        ("a", "b</s>\n"),
    ),
    "eos by the tokenizer": (
        byte_bpe(eos=True),
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        ("a", "b</s></s>"),
        ("a", "b</s>"),
    ),
    "implicit prompt": (
        byte_bpe(),
        {"chosen": "\n\nAssistant: Hello", "rejected": "\n\nAssistant: Help"},
        ("\n\nAssistant: Hel", "lo</s>"),
        ("\n\nAssistant:", " Hello</s>"),
    ),
}


@pytest.mark.parametrize("case", DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_the_differences_that_the_documentation_names(case):
    tokenizer, row, theirs, ours = case
    ids = {"theirs": theirs, "ours": ours}
    (trl_pair,) = tokenised_by_trl(datasets.Dataset.from_list([row]), tokenizer, None)
    (pair,), _ = tokenize_preferences(load_preferences([row]), tokenizer, max_length=None)
    for who, found in (("theirs", trl_pair), ("ours", pair)):
        texts = tuple(tokenizer.decode(found[column]) for column in IDS[:2])
        assert texts == ids[who], who
