"""Rows with many answers come to their normal form from every source, and bad ones are named."""

from __future__ import annotations

import json

import datasets
import pytest

from dpofast.columns import RANKED
from dpofast.data import (
    data_kind,
    hold_out,
    load_preferences,
    load_unpaired,
    mix_preferences,
    rows_by_source,
    split_pairs,
)
from dpofast.data.reading.messages import decode_messages
from dpofast.data.reading.normal_form import is_normal_form, source_notes
from dpofast.errors import ConfigError, DataError
from tests.data.builders import assistant, user, write_rows

TEXT = {"prompt": "q", "completions": ["a", "b", "c", "d"], "scores": [1, 2.5, 2.5, 0]}
PAIRS = [[1, 0], [2, 0], [0, 3], [1, 3], [2, 3]]
CHAT = {
    "prompt": [user("q")],
    "completions": [[assistant(text)] for text in "abcd"],
    "scores": TEXT["scores"],
}
WHOLE = [[user("q"), assistant(text)] for text in "abcd"]
FORMS = {
    "messages": CHAT,
    "one message each": {**CHAT, "completions": [assistant(text) for text in "abcd"]},
    "texts": {**CHAT, "completions": list("abcd")},
    "mixed": {**CHAT, "completions": ["a", [assistant("b")], assistant("c"), "d"]},
    "whole conversations": {**TEXT, "prompt": None, "completions": WHOLE},
    "messages column": {"messages": [user("q")], "completions": list("abcd"), **TEXT, "prompt": []},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "completions": [{"from": "gpt", "value": text} for text in "abcd"],
        "scores": TEXT["scores"],
    },
    "ranks": {"prompt": CHAT["prompt"], "completions": list("abcd"), "ranks": [2, 1, 1, 3]},
    "preferences": {"prompt": CHAT["prompt"], "completions": list("abcd"), "preferences": PAIRS},
    "json": {name: json.dumps(value) for name, value in CHAT.items()},
}


def parts(row):
    """The prompt and the answers of a row of messages."""
    return [decode_messages(each) for each in (row["prompt"], *row["completions"])]


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS.keys())
def test_every_form_gives_the_same_row(row):
    loaded = load_preferences([row])
    assert parts(loaded[0]) == [[user("q")], *([assistant(text)] for text in "abcd")]
    assert (loaded[0]["pairs"], loaded[0]["row"]) == (PAIRS, 0)
    assert loaded[0]["ties"] == ("preferences" not in row)
    assert data_kind([row]) == "ranked"
    assert is_normal_form(loaded, RANKED)
    assert not is_normal_form(loaded)
    assert source_notes(loaded).unused_columns == ()


def test_every_source_gives_the_same_rows(tmp_path):
    rows = [{**CHAT, "models": list("wxyz")}, {**CHAT, "models": list("wxyz")}]
    expected = load_preferences(rows)
    assert source_notes(expected).unused_columns == ("models",)
    dataset = datasets.Dataset.from_list(rows)
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    files = [write_rows(tmp_path / f"rows{end}", rows) for end in (".json", ".jsonl", ".parquet")]
    for source in (*files, dataset, stream):
        assert load_preferences(source).to_list() == expected.to_list(), source
    renamed = [{"q": row["prompt"], "all": row["completions"], "r": row["scores"]} for row in rows]
    columns = {"prompt": "q", "completions": "all", "scores": "r"}
    assert load_preferences(renamed, columns=columns).to_list() == expected.to_list()
    assert data_kind(renamed, columns=columns) == "ranked"


def test_ids_and_weights_are_kept():
    row = {"prompt_ids": [1], "completions_ids": [[2], [3, 4], []], "preferences": [[0, 1], [1, 2]]}
    first, lost = load_preferences([{**row, "weight": 2, "label_confidence": 0.75, "row": 7}])
    assert (first["prompt_ids"], first["completions_ids"]) == ([1], [[2], [3, 4]])
    assert (first["pairs"], first["weight"], first["label_confidence"]) == ([[0, 1]], 2, 0.75)
    assert (first["row"], lost["row"], lost["left_out"]) == (7, 7, "empty answer")


def test_an_empty_answer_takes_only_its_own_pairs():
    for empty in ("", " ", [], {}, {"role": "assistant", "content": ""}):
        row = {**CHAT, "completions": [[assistant("a")], empty, [assistant("c")], "d"]}
        first, *lost = load_preferences([row])
        assert parts(first)[1:] == [[assistant("a")], [assistant("c")], [assistant("d")]]
        assert first["pairs"] == [[1, 0], [0, 2], [1, 2]], "places among the answers that are left"
        assert [each["left_out"] for each in lost] == ["empty answer"] * 2
        with pytest.raises(DataError, match=r"row 0 .*: completions\[1\] is an empty answer"):
            load_preferences([row], strict=True)
    only_one = load_preferences([{**TEXT, "completions": ["a", "", "", ""]}, TEXT])
    assert only_one["left_out"][:] == ["empty answer"] * 5 + [None]
    assert sum(only_one["ties"]) == 2, "pairs that equal scores leave unmade are counted anyway"


def test_an_empty_answer_does_not_hide_the_prompt_of_whole_conversations():
    first, *lost = load_preferences([{"completions": [*WHOLE[:2], []], "scores": [2, 1, 0]}])
    assert parts(first) == [[user("q")], [assistant("a")], [assistant("b")]]
    assert len(lost) == 2


def test_the_normal_form_of_older_versions_is_read():
    saved = load_preferences([{"prompt": "p", "chosen": "x", "rejected": "y"}])
    saved.info.description = saved.info.description.replace(', "answer_pairs": []', "")
    assert "answer_pairs" not in saved.info.description
    assert load_preferences(saved) is saved


def test_answers_in_no_pair_are_not_kept():
    row = load_preferences([TEXT], answer_pairs="best_worst")[0]
    assert (row["completions"], row["pairs"], row["ties"]) == (["b", "d"], [[0, 1]], 0)
    assert row["places"] == [1, 3], "in the source"


def test_places_and_errors_stay_those_of_the_source_when_rows_are_read_again():
    rows = load_preferences([TEXT, TEXT], answer_pairs="best_worst")
    assert load_preferences(rows, strict=True)["places"][:] == [[1, 3]] * 2
    cleared = rows.map(lambda row: {"completions": [row["completions"][0], " "]})
    with pytest.raises(DataError, match=r"completions\[3\] is an empty answer"):
        load_preferences(cleared, strict=True)


def test_identical_answers_are_kept_for_the_report_or_refused():
    row = {**TEXT, "completions": ["a", "a", "c", "d"]}
    assert load_preferences([row])[0]["pairs"] == PAIRS
    with pytest.raises(DataError, match="two answers of a pair are identical"):
        load_preferences([row], strict=True)


def test_rows_in_the_normal_form_keep_their_pairs():
    loaded = load_preferences([TEXT, {**TEXT, "completions": ["a", "", "c", "d"]}])
    assert load_preferences(loaded) is loaded
    assert load_preferences(loaded, answer_pairs="all") is loaded
    with pytest.raises(ConfigError, match=r"answer_pairs is adjacent, .* were made with all; give"):
        load_preferences(loaded, answer_pairs="adjacent")
    roles = {"nobody": "user"}  # has the rows read again
    assert load_preferences(loaded, roles=roles).to_list() == loaded.to_list()
    pairs = [{"prompt": "p", "chosen": "x", "rejected": rejected} for rejected in ("", "y")]
    mixture = mix_preferences({"many": loaded, "two": pairs})
    assert load_preferences(mixture, roles=roles).to_list() == mixture.to_list()


BAD = {
    "one answer": ({"completions": ["a"], "scores": [1]}, "completions has 1 answer,"),
    "equal scores": ({"scores": [1, 1, 1, 1]}, "all scores are 1"),
    "nan": ({"scores": [1, float("nan"), 2, 3]}, r"scores\[1\] is nan"),
    "no answer": ({"scores": None, "preferences": [[0, 4]]}, "4 names no answer"),
    "no list": ({"completions": "abcd"}, "completions is not a list of answers but 'abcd'"),
    "Python's list": ({"completions": "['a', 'b']"}, "write a list as JSON, with texts in double"),
    "objects": (
        {"completions": [{"text": "a", "score": 1}] * 4, "scores": None},
        r"completions\[0\] is an object with text, score; write each answer as a text",
    ),
    "null answer": ({"completions": ["a", None, "c", "d"]}, r"completions\[1\] is null; .* too"),
    "a number": ({"completions": ["a", 2, "c", "d"]}, r"completions\[1\] is not text but int 2"),
    "log-probs": ({"ref_chosen_logps": -1.0}, "has ref_chosen_logps, .* remove the columns"),
    "a pair": ({"chosen": "a", "rejected": "b"}, "the row is a pair, and rows with many answers"),
    "other column": ({"scores": None, "ranks": [1, 2, 3, 4]}, "write all rows in one form"),
    "no system": (
        {
            "prompt": None,
            "completions": [*WHOLE[:3], [{"role": "system", "content": "s"}, *WHOLE[3]]],
        },
        r"completions\[3\] begins with a system message and completions\[0\] doesn't",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_rows_are_named_or_left_out(tmp_path, change, message):
    path = tmp_path / "ranked.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (TEXT, {**TEXT, **change}, TEXT)))
    with pytest.raises(DataError, match=f"^{path}, line 2: .*{message}"):
        load_preferences(path)
    loaded = load_preferences(path, skip_bad_rows=True)
    assert loaded["left_out"][:] == [None, "bad row", None]
    assert loaded["problem"][1].startswith(f"{path}, line 2: ")


def test_a_list_of_answers_with_another_name_is_named():
    row = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}
    with pytest.raises(DataError, match=r"no column 'completions' .*={'completions': 'responses'}"):
        load_preferences([row])
    del row["scores"]
    with pytest.raises(DataError, match=r"if responses has .*={'completions': 'responses'}"):
        load_preferences([row])
    with pytest.raises(DataError, match=r"there is no column 'rejected'"):
        load_preferences([{**row, "chosen": "a"}])


def test_one_column_can_be_given_for_two():
    rows = [{"prompt": "q", "rated": ["1", "2"]}]
    columns = {"completions": "rated", "scores": "rated"}
    assert load_preferences(rows, columns=columns)[0]["pairs"] == [[1, 0]]


def test_unpaired_rows_and_ranked_ones_do_not_go_together():
    with pytest.raises(DataError, match=r"holds rows with many answers .* completion and label"):
        load_unpaired([TEXT], name="rows")
    with pytest.raises(DataError, match=r"rows holds rows with many answers .* completion and"):
        split_pairs([TEXT], name="rows")
    unpaired = load_unpaired([{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(DataError, match="one holds rows with many answers and two unpaired rows"):
        mix_preferences({"one": [TEXT], "two": unpaired})


MESSAGES = {"prompt": [user("p")], "chosen": [assistant("x")], "rejected": [assistant("y")]}
TOKENS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
RANKED_IDS = {"prompt_ids": [5], "completions_ids": [[6], [7]], "scores": [0, 1]}


@pytest.mark.parametrize(
    ("ranked", "pair", "answers"),
    [
        (TEXT, {"prompt": "p", "chosen": "x", "rejected": "y"}, ["x", "y"]),
        (CHAT, MESSAGES, [[json.dumps(assistant(text))] for text in "xy"]),
        (RANKED_IDS, TOKENS, [[2], [3]]),
    ],
    ids=["text", "messages", "ids"],
)
def test_pairs_beside_ranked_rows_become_ranked_rows(ranked, pair, answers):
    empty = {**pair, "chosen_ids" if "chosen_ids" in pair else "chosen": []}
    if ranked is TEXT:
        empty["chosen"] = ""
    mixture = mix_preferences({"many": [ranked], "two": [pair, empty, pair]})
    assert is_normal_form(mixture, RANKED)
    column = "completions_ids" if ranked is RANKED_IDS else "completions"
    assert mixture[0] == {**load_preferences([ranked])[0], "source": "many", "left_out": None}
    assert [mixture[i][column] for i in (1, 2, 3)] == [answers, None, answers]
    assert mixture["pairs"][1:] == [[[0, 1]], None, [[0, 1]]]
    assert mixture["places"][1:] == [[0, 1], None, [0, 1]]
    assert mixture["left_out"][:] == [None, None, "empty answer", None]
    assert rows_by_source(mixture) == {"many": len(mixture[0]["pairs"]), "two": 2}


def test_pairs_with_log_probs_are_refused_beside_ranked_rows():
    pair = {"prompt": "p", "chosen": "x", "rejected": "y"}
    scored = {**pair, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    with pytest.raises(DataError, match=r"two has ref_chosen_logps .* but one has not"):
        mix_preferences({"one": [TEXT], "two": [scored]})


def test_shares_and_held_out_parts_count_pairs_and_keep_rows_whole():
    many = [{**TEXT, "prompt": f"m{i}"} for i in range(20)]  # 5 pairs each
    two = [{"prompt": f"p{i}", "chosen": "x", "rejected": "y"} for i in range(40)]
    mixture = mix_preferences({"many": many, "two": two}, {"many": 1, "two": 1})
    assert rows_by_source(mixture) == {"many": 40, "two": 40}
    training, held = hold_out(mix_preferences({"many": many, "two": two}), 0.2)
    assert rows_by_source(held) == {"many": 20, "two": 8}
    assert rows_by_source(training) == {"many": 80, "two": 32}
    assert set(held["prompt"]).isdisjoint(training["prompt"])
    few = mix_preferences({"many": many[:1], "two": two[:4]}, {"many": 1, "two": 1})
    assert rows_by_source(few) == {"many": 5, "two": 4}, "one row at least, and whole"
