"""Facts about the real preference files; skipped if they are not on this machine."""

from __future__ import annotations

import json

import pytest

from benchmarks.data import REAL, REPOSITORY, find_data, race_tokenizer
from dpofast.data import (
    data_fingerprint,
    load_preferences,
    load_unpaired,
    split_pairs,
    tokenize_preferences,
    tokenize_unpaired,
)
from dpofast.data.prefix import common_prefix_length
from dpofast.errors import DataError

LENGTHS = REPOSITORY / "benchmarks" / "lengths.json"
IDENTICAL_ROWS = (122, 226, 400, 566, 628, 676)


def real(name):
    path, source = find_data(name)
    if source != REAL:
        pytest.skip(f"{name}.json isn't here; set DPOFAST_DATA to its folder")
    return path


@pytest.fixture(scope="module", params=["dpo_en_demo", "instruction_preference"])
def tokenised(request):
    path = real(request.param)
    tokenizer = race_tokenizer(path)
    pairs, report = tokenize_preferences(load_preferences(path), tokenizer, max_length=None)
    return request.param, tokenizer, pairs, report


def test_counts(tokenised):
    name, _, pairs, report = tokenised
    if name == "dpo_en_demo":
        assert (report.pairs_read, len(pairs), report.left_out) == (300, 300, {})
    else:
        assert (report.pairs_read, len(pairs)) == (1_100, 1_094)
        assert report.left_out == {"identical answers": IDENTICAL_ROWS}
    assert report.rerendered_prompts == 0


def test_every_pair_has_one_bos_and_ends_as_the_template_ends(tokenised):
    _, tokenizer, pairs, _ = tokenised
    end = tokenizer("</s>\n", add_special_tokens=False)["input_ids"]
    for pair in pairs:
        assert pair["prompt_ids"].count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(pair["prompt_ids"]).endswith("<|assistant|>\n")
        for answer in ("chosen_ids", "rejected_ids"):
            assert tokenizer.bos_token_id not in pair[answer]
            assert pair[answer][-len(end) :] == end
            assert pair[answer].count(tokenizer.eos_token_id) == 1


def test_strict_names_the_first_identical_pair():
    with pytest.raises(DataError, match=r"instruction_preference\.json, row 122 .*identical"):
        load_preferences(real("instruction_preference"), strict=True)


def test_the_unpaired_file_is_refused_with_the_remedy():
    with pytest.raises(DataError, match=r"kto_en_demo\.json holds unpaired .*loss_type kto"):
        load_preferences(real("kto_en_demo"))


def test_the_unpaired_file_has_the_ids_of_its_rows_as_pairs():
    path = real("kto_en_demo")
    tokenizer = race_tokenizer(real("dpo_en_demo"))
    rows, report = tokenize_unpaired(load_unpaired(path), tokenizer, max_length=None)
    assert (report.pairs_read, report.pairs_kept) == (300, 300)
    assert report.labels == {"desirable": 150, "undesirable": 150}
    source = json.loads(path.read_text(encoding="utf-8"))
    assert rows["label"][:] == [row["label"] for row in source]
    other = {"role": "assistant", "content": "Something else."}
    pairs = [
        {"prompt": row["messages"][:-1], "chosen": row["messages"][-1:], "rejected": [other]}
        for row in source
    ]
    paired, _ = tokenize_preferences(load_preferences(pairs), tokenizer, max_length=None)
    assert rows["prompt_ids"][:] == paired["prompt_ids"][:]
    assert rows["completion_ids"][:] == paired["chosen_ids"][:]


def test_split_pairs_have_the_ids_of_their_pairs(tokenised):
    name, tokenizer, pairs, _ = tokenised
    after = split_pairs(pairs)
    before = split_pairs(load_preferences(real(name)))
    rows, report = tokenize_unpaired(before, tokenizer, max_length=None)
    assert report.labels == {"desirable": len(pairs), "undesirable": len(pairs)}
    assert after.to_list() == rows.select_columns(after.column_names).to_list()
    assert data_fingerprint(after) == data_fingerprint(rows)


def test_the_benchmarks_know_the_lengths_of_the_short_pairs(tokenised):
    name, _, pairs, _ = tokenised
    known = json.loads(LENGTHS.read_text(encoding="utf-8"))[name]
    assert len(known) == len(pairs)
    if name != "instruction_preference":
        return  # the benchmarks know the lengths of these as text, without a chat template
    for lengths, pair in zip(known, pairs, strict=True):
        chosen, rejected = pair["chosen_ids"], pair["rejected_ids"]
        common = common_prefix_length(chosen, rejected)
        assert lengths == [len(pair["prompt_ids"]), common, len(chosen), len(rejected)]
