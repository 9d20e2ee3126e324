"""Each pair becomes two rows, and nothing is lost in silence."""

from __future__ import annotations

import pytest

from dpofast.data import (
    load_preferences,
    load_unpaired,
    split_pairs,
    tokenize_preferences,
    tokenize_unpaired,
)
from dpofast.errors import DataError
from tests.data.builders import CHAT_TEMPLATE, assistant, byte_bpe, ids_row, user

MERGES = (("b", "c"), ("bc", "d"))
PAIRS = [
    {"prompt": "ab", "chosen": "cdx", "rejected": "xx"},
    {"prompt": "q", "chosen": "y", "rejected": "z"},
]


def test_each_pair_is_two_rows_in_its_order():
    rows = split_pairs(PAIRS)
    assert rows.to_list() == [
        {"row": 0, "prompt": "ab", "completion": "cdx", "label": True},
        {"row": 0, "prompt": "ab", "completion": "xx", "label": False},
        {"row": 1, "prompt": "q", "completion": "y", "label": True},
        {"row": 1, "prompt": "q", "completion": "z", "label": False},
    ]
    assert load_unpaired(rows) is rows


@pytest.mark.parametrize(
    "tokenizer", [byte_bpe(MERGES), byte_bpe(MERGES, prefix_space=True), byte_bpe(bos=True)]
)
def test_ids_are_those_of_the_pairs(tokenizer):
    pairs, _ = tokenize_preferences(load_preferences(PAIRS), tokenizer, max_length=None)
    rows, report = tokenize_unpaired(split_pairs(PAIRS), tokenizer, max_length=None)
    assert (
        split_pairs(pairs).to_list()
        == rows.select_columns(["prompt_ids", "row", "completion_ids", "label"]).to_list()
    )
    for pair, desirable, other in zip(pairs, list(rows)[::2], list(rows)[1::2], strict=True):
        assert desirable["prompt_ids"] == other["prompt_ids"] == pair["prompt_ids"]
        assert desirable["completion_ids"] == pair["chosen_ids"]
        assert other["completion_ids"] == pair["rejected_ids"]
    assert report.labels == {"desirable": 2, "undesirable": 2}


def test_messages_keep_what_the_template_gets():
    pair = {"prompt": [user("a")], "chosen": "b", "rejected": "c", "tools": [{"name": "f"}]}
    rows = split_pairs([pair])
    assert rows["tools"][:] == ['[{"name": "f"}]'] * 2
    tokenizer = byte_bpe(chat_template=CHAT_TEMPLATE)
    ids, _ = tokenize_unpaired(rows, tokenizer, max_length=None)
    expected, _ = tokenize_preferences(load_preferences([pair]), tokenizer, max_length=None)
    assert ids["completion_ids"][:] == [expected[0]["chosen_ids"], expected[0]["rejected_ids"]]
    assert assistant("b")["content"] in tokenizer.decode(ids[0]["completion_ids"])


def test_a_tokenised_pair_that_was_not_cut_yet():
    rows = split_pairs([ids_row(2, 3, 4)])
    assert rows["completion_ids"][:] == [[50, 51, 52], [90, 91, 92, 93]]
    assert load_unpaired(rows) is rows


def test_pairs_that_say_nothing_are_left_out_once_and_reported():
    pairs = [
        *PAIRS,
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": "", "rejected": "z"},
    ]
    rows, report = tokenize_unpaired(split_pairs(pairs), byte_bpe(), max_length=None)
    assert rows["row"][:] == [0, 0, 1, 1]
    assert report.left_out == {"identical answers": (2,), "empty answer": (3,)}
    assert (report.pairs_read, report.pairs_kept) == (6, 4)


def test_reference_log_probs_are_named_as_unused():
    logps = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    rows = split_pairs([{**PAIRS[0], **logps}])
    assert not set(logps) & set(rows.column_names)
    _, report = tokenize_unpaired(rows, byte_bpe(), max_length=None)
    assert report.unused == ("ref_chosen_logps", "ref_rejected_logps")


def test_both_rows_have_the_weight_of_their_pair():
    pairs = [{**PAIRS[0], "weight": 0.5}, {**PAIRS[1], "weight": 2.0}]
    rows = split_pairs(pairs)
    assert rows["weight"][:] == [0.5, 0.5, 2.0, 2.0]
    tokens, _ = tokenize_unpaired(rows, byte_bpe(), max_length=None)
    assert tokens["weight"][:] == [0.5, 0.5, 2.0, 2.0]


def test_a_confidence_belongs_to_both_answers_and_is_named_as_unused():
    rows = split_pairs([{**PAIRS[0], "label_confidence": 0.9}])
    assert "label_confidence" not in rows.column_names
    _, report = tokenize_unpaired(rows, byte_bpe(), max_length=None)
    assert report.unused == ("label_confidence",)


def test_unpaired_rows_have_nothing_to_split():
    with pytest.raises(DataError, match="rows holds unpaired rows"):
        split_pairs([{"prompt": "a", "completion": "b", "label": True}], name="rows")
