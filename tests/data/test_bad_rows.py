"""Bad rows and empty answers: what is left out, reported or refused."""

from __future__ import annotations

import json
import random

import pytest

from dpofast.data import load_preferences, tokenize_preferences
from dpofast.errors import ConfigError, DataError
from tests.data.builders import CHAT_TEMPLATE, assistant, byte_bpe, system, user

TOKENIZER = byte_bpe(chat_template=CHAT_TEMPLATE)


def good(number):
    return {
        "prompt": [system("Be short."), user(f"question {number}")],
        "chosen": [assistant(f"good {number}")],
        "rejected": [assistant(f"bad {number}")],
    }


# Eight kinds of bad rows, each as a line of a file, with the reason.
BAD = {
    "null in a prompt": ({**good(0), "prompt": [None]}, "prompt has no messages"),
    "number": ({**good(0), "rejected": 4}, "rejected is not a list of messages but int"),
    "no column": ({"prompt": [user("a")], "chosen": "b"}, "no column 'rejected'"),
    "broken JSON": ('{"prompt": ', "broken JSON"),
    "no object": ([1, 2], "the row is list"),
    "no role": ({**good(0), "prompt": [{"content": "a"}]}, "neither role nor from"),
    "another form": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "write all rows in one form"),
    "template": ({**good(0), "prompt": [user(None)]}, "null or missing"),
}
BLANK = {**good(0), "chosen": [assistant(" \n")]}
SAME = {**good(0), "rejected": good(0)["chosen"]}


def write(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def mixed_file(path, size=800, per_kind=2):
    """A file with 2 % bad rows of eight kinds, and what is at which row."""
    rng = random.Random(5)
    kinds = [kind for kind in (*BAD, "blank", "same") for _ in range(per_kind)]
    at = dict(zip(rng.sample(range(size), len(kinds)), kinds, strict=True))
    special = {**{kind: row for kind, (row, _) in BAD.items()}, "blank": BLANK, "same": SAME}
    return write(path, [special[at[i]] if i in at else good(i) for i in range(size)]), at


def tokenise(path, **options):
    pairs = load_preferences(path, **options)
    return tokenize_preferences(pairs, TOKENIZER, max_length=None, name="train", **options)


def test_bad_rows_of_eight_kinds_are_one_error(tmp_path):
    path, at = mixed_file(tmp_path / "pairs.jsonl")
    with pytest.raises(DataError) as caught:
        tokenise(path)
    first, *places, more, remedy = str(caught.value).splitlines()
    bad = sorted(row for row, kind in at.items() if kind in BAD)
    assert first == f"{path}: 16 of 800 rows can't be used:"
    assert [place.partition(": ")[0].rpartition(" ")[2] for place in places] == [
        str(row + 1) for row in bad[:10]
    ]
    for place, row in zip(places, bad, strict=False):
        assert BAD[at[row]][1] in place
    assert more == "  and 6 more"
    assert "skip_bad_rows: true" in remedy


def test_bad_rows_are_left_out_and_reported(tmp_path):
    path, at = mixed_file(tmp_path / "pairs.jsonl")
    pairs, report = tokenise(path, skip_bad_rows=True)
    assert sorted(pairs["row"]) == [row for row in range(800) if row not in at]
    rows = {
        reason: tuple(sorted(row for row, kind in at.items() if kind in kinds))
        for reason, kinds in {
            "identical answers": {"same"},
            "empty answer": {"blank"},
            "bad row": set(BAD),
        }.items()
    }
    assert report.left_out == rows
    assert (report.pairs_read, report.pairs_kept) == (800, 780)
    assert len(report.problems) == 16
    for problem, row in zip(report.problems, rows["bad row"], strict=True):
        assert problem.startswith(f"{path}, line {row + 1}: ")
        assert BAD[at[row]][1] in problem
    lines = report.lines()
    assert "  left out, empty answer: 2 (rows from 0: " in "\n".join(lines)
    assert sum(line.startswith(f"    {path}, line ") for line in lines) == 10
    json.dumps(report.as_dict())


def test_strict_stops_at_the_first_pair_that_would_be_left_out(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [good(0), BLANK, good(1)])
    with pytest.raises(DataError, match="line 2: chosen is an empty answer"):
        load_preferences(path, strict=True)
    with pytest.raises(DataError, match=r"train, row 1 .*an empty answer"):
        tokenize_preferences(load_preferences(path), TOKENIZER, max_length=None, strict=True)


def test_strict_and_skipping_contradict_each_other():
    for function in (
        lambda **options: load_preferences([good(0)], **options),
        lambda **options: tokenize_preferences([good(0)], TOKENIZER, max_length=None, **options),
    ):
        with pytest.raises(ConfigError, match="skip_bad_rows"):
            function(strict=True, skip_bad_rows=True)


EMPTY = {
    "text": ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": ""}),
    "blank text": ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"rejected": " \n\t"}),
    "message": (good(1), {"rejected": [assistant("")]}),
    "null": (good(1), {"chosen": None}),
    "null text": ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"rejected": None}),
    "null content": (good(1), {"rejected": [assistant(None)]}),
    "object": (good(1), {"rejected": {}}),
    "list of nothing": (good(1), {"rejected": [{}]}),
    "no message": (good(1), {"rejected": []}),
    "no message beside a text": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"rejected": []},
    ),
    "null free blocks": (good(1), {"chosen": [assistant([{"type": "text", "text": " "}])]}),
    "conversation": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"rejected": "\n\nHuman: a\n\nAssistant:"},
    ),
    "null ids": (
        {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]},
        {"rejected_ids": None},
    ),
    "old null ids": (
        {"prompt_input_ids": [5], "chosen_input_ids": [6], "rejected_input_ids": [7]},
        {"chosen_input_ids": None},
    ),
    "ids": ({"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}, {"chosen_ids": []}),
}


@pytest.mark.parametrize(("row", "change"), EMPTY.values(), ids=EMPTY.keys())
def test_an_empty_answer_is_left_out_of_every_form(row, change):
    pairs, report = tokenise([row, {**row, **change}, row])
    assert report.left_out == {"empty answer": (1,)}
    assert pairs["row"][:] == [0, 2]
    assert report.answer_lengths.longest > 0


def test_a_call_of_a_tool_is_no_empty_answer():
    call = {**assistant(""), "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    template = CHAT_TEMPLATE.replace("eos_token }}", "(message.tool_calls or '') | string }}")
    tokenizer = byte_bpe(chat_template=template)
    rows = load_preferences([{**good(0), "chosen": [call]}])
    assert tokenize_preferences(rows, tokenizer, max_length=None)[1].left_out == {}


def test_one_bad_row_keeps_its_short_message(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [good(0), {**good(1), "chosen": 4}])
    with pytest.raises(DataError) as caught:
        load_preferences(path)
    assert str(caught.value) == (
        f"{path}, line 2: chosen is not a list of messages but int 4; "
        'write [{"role": "user", "content": "..."}] '
        "(skip_bad_rows: true leaves such rows out)"
    )


@pytest.mark.parametrize("skip", [False, True])
def test_a_file_without_any_good_row_is_refused_early(tmp_path, skip):
    rows = [{"prompt": "a", "chosen": "b", "rejectd": "c"}] * 5_000
    with pytest.raises(DataError) as caught:
        load_preferences(write(tmp_path / "pairs.jsonl", rows), skip_bad_rows=skip)
    assert "1000 of 1000 rows can't be used" in str(caught.value)
    assert "'rejectd'" in str(caught.value)


def test_most_rows_decide_which_form_is_right():
    odd = {"prompt": "a", "chosen": "b", "rejected": "c"}
    pairs, report = tokenise([odd, good(1), good(2), good(3)], skip_bad_rows=True)
    assert report.left_out == {"bad row": (0,)}
    assert pairs["row"][:] == [1, 2, 3]


def test_rows_that_the_tokenizer_finds_bad_are_collected():
    template = "{{ raise_exception('no') if messages[0].content == 'x' }}" + CHAT_TEMPLATE
    tokenizer = byte_bpe(chat_template=template)
    rows = [{**good(i), "prompt": [user("x" if i % 3 else "y")]} for i in range(30)]
    pairs = load_preferences(rows)
    with pytest.raises(DataError) as caught:
        tokenize_preferences(pairs, tokenizer, max_length=None, name="eval")
    assert "eval: 20 of 30 rows can't be used" in str(caught.value)
    assert "eval, row 1 (counted from 0): the tokenizer's chat template can't" in str(caught.value)
    kept, report = tokenize_preferences(pairs, tokenizer, max_length=None, skip_bad_rows=True)
    assert kept["row"][:] == list(range(0, 30, 3))
    assert len(report.problems) == 20


def test_nothing_left_is_refused():
    with pytest.raises(DataError, match=r"all 2 pairs were left out \(empty answer 2\)"):
        tokenise([BLANK, BLANK])
