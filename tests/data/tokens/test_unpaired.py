"""Unpaired rows get the ids that the same prompt and answer get in a pair."""

from __future__ import annotations

import pytest

from dpofast.data import (
    data_fingerprint,
    load_preferences,
    load_unpaired,
    refuse_one_label,
    tokenize_preferences,
    tokenize_unpaired,
)
from dpofast.errors import ConfigError, DataError
from tests.data.builders import (
    CHAT_TEMPLATE,
    THINKING_TEMPLATE,
    assistant,
    byte_bpe,
    metaspace,
    system,
    user,
    word_level,
)

MERGES = (("b", "c"), ("bc", "d"))
TOKENIZERS = {
    "merges": byte_bpe(MERGES),
    "blank": byte_bpe(MERGES, prefix_space=True),
    "bos and eos": byte_bpe(MERGES, bos=True, eos=True),
    "metaspace": metaspace("ab cd"),
    "words": word_level("ab cd x xx"),
}
TEXTS = [("ab", "cdx"), ("ab", "xx"), ("a b", " cd"), ("x", "x x")]


def rows_of(*answers, **more):
    return [{"prompt": p, "completion": a, "label": True, **more} for p, a in answers]


def ids(prompt, completion):
    return {"prompt_ids": prompt, "completion_ids": completion, "label": True}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@pytest.mark.parametrize("limits", [{}, {"max_length": 4}, {"max_completion_length": 2}])
def test_texts_have_the_ids_of_a_pair(tokenizer, limits):
    options = {"max_length": None, **limits}
    rows, report = tokenize_unpaired(load_unpaired(rows_of(*TEXTS)), tokenizer, **options)
    pairs = [{"prompt": p, "chosen": a, "rejected": "ab ab ab"} for p, a in TEXTS]
    expected, of_pairs = tokenize_preferences(load_preferences(pairs), tokenizer, **options)
    assert rows["row"][:] == expected["row"][:]
    assert rows["prompt_ids"][:] == expected["prompt_ids"][:]
    assert rows["completion_ids"][:] == expected["chosen_ids"][:]
    assert report.prompt_lengths == of_pairs.prompt_lengths
    assert report.limits == of_pairs.limits


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, THINKING_TEMPLATE])
def test_messages_have_the_ids_of_a_pair(template):
    tokenizer = byte_bpe(chat_template=template)
    prompt, answer = [system("s"), user("a"), assistant("b"), user("c")], [assistant("d")]
    data = load_unpaired([{"messages": prompt + answer, "label": False}])
    rows, report = tokenize_unpaired(data, tokenizer, max_length=None)
    pair = {"prompt": prompt, "chosen": answer, "rejected": [assistant("e")]}
    expected, of_pair = tokenize_preferences(load_preferences([pair]), tokenizer, max_length=None)
    assert rows[0]["prompt_ids"] == expected[0]["prompt_ids"]
    assert rows[0]["completion_ids"] == expected[0]["chosen_ids"]
    assert report.rerendered_prompts == of_pair.rerendered_prompts


def test_columns_and_report():
    data = [ids([1, 2], [3, 4, 5]), {**ids([1], [2]), "label": False}, ids([1, 2, 3], [4])]
    rows, report = tokenize_unpaired(load_unpaired(data), None, max_length=3, name="kto")
    assert rows.to_list() == [
        {"prompt_ids": [1, 2], "completion_ids": [3], "label": True, "row": 0},
        {"prompt_ids": [1], "completion_ids": [2], "label": False, "row": 1},
    ]
    lines = report.lines()
    assert lines[:3] == [
        "kto: 3 rows read, 2 kept",
        "  labels: 1 desirable, 1 undesirable",
        "  left out, no room for an answer: 1 (rows from 0: 2)",
    ]
    plain = report.as_dict()
    assert plain["labels"] == {"desirable": 1, "undesirable": 1}
    assert plain["answer_lengths"]["longest"] == 3
    assert (report.answers_cut, report.tokens_cut) == (1, 2)


def test_pairs_have_no_labels_in_their_report():
    data = load_preferences([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    _, report = tokenize_preferences(data, byte_bpe(), max_length=None)
    assert "labels" not in report.as_dict()
    assert report.lines()[0] == "train: 1 pair read, 1 kept"


def test_keep_end_cuts_the_prompt_by_what_its_answer_needs():
    data = load_unpaired([ids(list(range(8)), [1, 2])])
    rows, _ = tokenize_unpaired(data, None, max_length=6, truncation_mode="keep_end")
    assert rows["prompt_ids"][:] == [[4, 5, 6, 7]]


def test_an_answer_that_is_only_eos_is_left_out():
    tokenizer = byte_bpe()
    data = load_unpaired(rows_of(("a", "b"), ("a", tokenizer.eos_token)))
    _, report = tokenize_unpaired(data, tokenizer, max_length=None)
    assert report.left_out == {"empty answer": (1,)}
    with pytest.raises(DataError, match=r"row 1 .*the row has an empty answer"):
        tokenize_unpaired(data, tokenizer, max_length=None, strict=True)


def test_rows_are_read_first_and_bad_ones_are_reported():
    rows = rows_of(("a", "b"), ("", "b"), ("a", 4))
    with pytest.raises(DataError, match=r"train, row 2 .*completion is not text"):
        tokenize_unpaired(rows, byte_bpe(), max_length=None)
    _, report = tokenize_unpaired(rows, byte_bpe(), max_length=None, skip_bad_rows=True)
    assert report.left_out == {"bad row": (1, 2)}


def test_nothing_kept():
    data = load_unpaired([ids([1, 2, 3], [4])])
    with pytest.raises(DataError, match=r"all 1 rows were left out .*; raise max_length$"):
        tokenize_unpaired(data, None, max_length=3)
    with pytest.raises(ConfigError, match="dataset_num_proc"):
        tokenize_unpaired(data, None, max_length=None, num_proc=0)


def test_the_fingerprint_covers_the_labels():
    rows = [ids([1], [2]), {**ids([3], [4]), "label": False}]
    swapped = [{**row, "label": not row["label"]} for row in rows]
    first, second = (
        tokenize_unpaired(load_unpaired(each), None, max_length=None)[0] for each in (rows, swapped)
    )
    assert data_fingerprint(first) != data_fingerprint(second)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (
            True,
            "kto: all 2 rows are desirable, and KTO needs answers of both kinds; add "
            "undesirable answers (label false)",
        ),
        (
            False,
            "kto: all 2 rows are undesirable, and KTO needs answers of both kinds; add "
            "desirable answers (label true)",
        ),
    ],
)
def test_one_label_is_refused(label, sentence):
    rows = load_unpaired([{**ids([1], [2]), "label": label}] * 2)
    with pytest.raises(DataError) as caught:
        refuse_one_label(rows, "kto")
    assert str(caught.value) == sentence
    both = load_unpaired([ids([1], [2]), {**ids([1], [2]), "label": False}])
    refuse_one_label(both, "kto")
