"""From the normal form to token ids: what is kept, cut and left out."""

from __future__ import annotations

import datasets
import pytest

from dpofast.data import data_fingerprint, load_preferences, tokenize_preferences
from dpofast.data.tokens.tokenize import split_row
from dpofast.errors import ConfigError, DataError
from tests.data.builders import byte_bpe, ids_row, random_rows


def tokenise(rows, max_length=None, **options):
    return tokenize_preferences(
        load_preferences(rows), options.pop("tokenizer", None), max_length=max_length, **options
    )


def test_columns_and_rows():
    pairs, report = tokenise([ids_row(2, 3, 4)])
    assert pairs.to_list() == [{**ids_row(2, 3, 4), "row": 0}]
    assert (report.pairs_read, report.pairs_kept, report.left_out) == (1, 1, {})


def test_reference_log_probs_pass_through():
    logps = {"ref_chosen_logps": -1.25, "ref_rejected_logps": -3.5}
    pairs, _ = tokenise([{**ids_row(2, 3, 4), **logps}])
    assert pairs.to_list() == [{**ids_row(2, 3, 4), **logps, "row": 0}]


def test_raw_rows_are_read_first():
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    raw = datasets.Dataset.from_list([row])
    pairs, _ = tokenize_preferences(raw, byte_bpe(), max_length=None)
    assert pairs.to_list() == tokenise([row], tokenizer=byte_bpe())[0].to_list()


def test_keep_start_cuts_answers_and_leaves_out_what_has_no_room():
    rows = [ids_row(4, 9, 2), ids_row(10, 1, 1), ids_row(9, 3, 3)]
    pairs, report = tokenise(rows, max_length=10)
    assert pairs["row"][:] == [0, 2]
    assert pairs[0]["chosen_ids"] == list(range(50, 56))
    assert pairs[0]["rejected_ids"] == [90, 91]
    assert (pairs[1]["chosen_ids"], pairs[1]["rejected_ids"]) == ([50], [90])
    assert report.left_out == {"no room for an answer": (1,)}
    assert (report.answers_cut, report.prompts_cut, report.tokens_cut) == (3, 0, 3 + 2 + 2)


def test_keep_end_cuts_the_prompt_once_for_the_pair():
    rows = [ids_row(8, 2, 5), ids_row(30, 12, 3)]
    pairs, report = tokenise(rows, max_length=10, truncation_mode="keep_end")
    assert pairs[0]["prompt_ids"] == list(range(13, 18))
    assert (len(pairs[0]["chosen_ids"]), len(pairs[0]["rejected_ids"])) == (2, 5)
    assert pairs[1]["prompt_ids"] == [39]
    assert pairs[1]["chosen_ids"] == list(range(50, 59))
    assert (report.answers_cut, report.prompts_cut, report.tokens_cut) == (1, 2, 3 + 29 + 3)


def test_prompts_and_answers_have_limits_of_their_own():
    rows = [ids_row(8, 6, 2), ids_row(3, 2, 9), ids_row(30, 9, 9)]
    options = {"max_prompt_length": 5, "max_completion_length": 7}
    pairs, report = tokenise(rows, max_length=10, **options)
    assert pairs[0] == {
        "row": 0,
        "prompt_ids": list(range(13, 18)),
        "chosen_ids": list(range(50, 55)),  # max_length leaves 5
        "rejected_ids": [90, 91],
    }
    assert pairs[1]["prompt_ids"] == [10, 11, 12]
    assert (pairs[1]["chosen_ids"], pairs[1]["rejected_ids"]) == ([50, 51], list(range(90, 97)))
    assert (report.answers_cut, report.prompts_cut) == (4, 2)
    assert report.tokens_cut == (3 + 1) + 2 + (25 + 4 + 4)
    without, _ = tokenise(rows, max_length=10, truncation_mode="keep_end")
    assert data_fingerprint(pairs) != data_fingerprint(without)


def test_answers_that_differ_in_what_is_cut_are_left_out():
    alike = {"prompt_ids": [1], "chosen_ids": [2, 3, 4, 5], "rejected_ids": [2, 3, 4, 6]}
    rows = [alike, ids_row(1, 4, 4)]
    pairs, report = tokenise(rows, max_completion_length=3)
    assert (pairs["row"][:], report.left_out) == ([1], {"identical answers after the cut": (0,)})
    with pytest.raises(DataError, match=r"row 0 .*identical answers after the cut"):
        tokenise(rows, max_completion_length=3, strict=True)
    with pytest.raises(DataError, match=r"all 1 pairs .*; raise max_completion_length$"):
        tokenise([alike], max_completion_length=3)


def test_a_cut_prompt_leaves_room():
    rows = [ids_row(20, 1, 1), ids_row(3, 1, 1)]
    assert tokenise(rows, max_length=10)[1].left_out == {"no room for an answer": (0,)}
    pairs, report = tokenise(rows, max_length=10, max_prompt_length=9)
    assert (len(pairs[0]["prompt_ids"]), report.left_out) == (9, {})
    error = r"20 tokens, .* max_prompt_length 11, max_length 10 .*lower max_prompt_length"
    with pytest.raises(DataError, match=error):
        tokenise(rows, max_length=10, max_prompt_length=11, strict=True)


def test_identical_answers_are_reported_and_left_out():
    same = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [2, 3]}
    alike = {"prompt_ids": [1], "chosen_ids": [2, 3, 4, 5], "rejected_ids": [2, 3, 4, 6]}
    pairs, report = tokenise([same, ids_row(1, 1, 1), alike, same], max_length=3)
    assert pairs["row"][:] == [1]
    assert report.left_out == {
        "identical answers": (0, 3),
        "identical answers after the cut": (2,),
    }


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (ids_row(10, 1, 1), "row 1 .*10 tokens, which leaves no room .*max_length 10"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}, "row 1 .*identical answers"),
    ],
)
def test_strict_stops_where_a_pair_would_be_left_out(row, text):
    with pytest.raises(DataError, match=text):
        tokenise([ids_row(1, 1, 1), row], max_length=10, strict=True)


def test_nothing_left_is_an_error():
    message = r"all 2 pairs were left out \(no room for an answer 2\); raise max_length$"
    with pytest.raises(DataError, match=message):
        tokenise([ids_row(10, 1, 1)] * 2, max_length=4)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(DataError, match="there is no tokenizer"):
        tokenise([{"prompt": "a", "chosen": "b", "rejected": "c"}])


@pytest.mark.parametrize("num_proc", [0, -1, 1.5])
def test_a_wrong_number_of_processes_is_refused(num_proc):
    with pytest.raises(ConfigError, match="dataset_num_proc"):
        tokenise([ids_row(1, 1, 1)], num_proc=num_proc)


def test_processes_change_nothing():
    alone, report = tokenise(random_rows(40), max_length=32)
    shared, shared_report = tokenise(random_rows(40), max_length=32, num_proc=2)
    assert alone.to_list() == shared.to_list()
    assert report == shared_report
    assert not shared.cache_files


def test_an_error_in_a_process_names_its_row():
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    rows[3] = {**rows[3], "chosen": "</s>"}
    with pytest.raises(DataError, match=r"train, row 3 .*an empty answer"):
        tokenise(rows, tokenizer=byte_bpe(), num_proc=2, strict=True)


def test_one_row_is_split_without_any_cut():
    row = load_preferences([ids_row(8, 2, 5)])[0]
    assert split_row(row, None).lengths == (8, 2, 5)


def test_a_part_of_the_data_keeps_the_rows_of_the_source():
    pairs = load_preferences([ids_row(1, 1, 1), ids_row(2, 1, 1), ids_row(9, 1, 1)])
    part, report = tokenize_preferences(pairs.select([2, 1]), None, max_length=9)
    assert part["row"][:] == [1]
    assert report.left_out == {"no room for an answer": (2,)}
