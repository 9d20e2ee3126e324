"""The report of a preparation, as text and as JSON."""

from __future__ import annotations

import json

from dpofast.data import load_preferences, tokenize_preferences
from tests.data.builders import ids_row


def report_of(rows, **options):
    return tokenize_preferences(load_preferences(rows), None, max_length=10, **options)[1]


def test_the_report_for_people_and_for_files():
    rows = [ids_row(4, 9, 2), ids_row(10, 1, 1), ids_row(2, 3, 3)]
    report = report_of(rows, name="eval")
    assert report.lines() == [
        "eval: 3 pairs read, 2 kept",
        "  left out, no room for an answer: 1 (rows from 0: 1)",
        "  cut to max_length 10 (keep_start): 0 prompts and 1 answer, 3 tokens in all",
        "  prompt tokens: p50 4, p90 10, p99 10, longest 10",
        "  answer tokens: p50 3, p90 9, p99 9, longest 9",
        "  sequence tokens: p50 11, p90 13, p99 13, longest 13",
    ]
    plain = report.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    names = ("max_length", "truncation_mode", "max_prompt_length", "max_completion_length")
    assert [plain[name] for name in names] == [10, "keep_start", None, None]
    assert plain["left_out"] == {"no room for an answer": [1]}
    assert plain["sequence_lengths"] == {"longest": 13, "p50": 11, "p90": 13, "p99": 13}


def test_the_report_names_the_limits_that_cut():
    report = report_of([ids_row(8, 9, 2)], max_prompt_length=5, max_completion_length=4)
    assert report.lines()[1] == (
        "  cut to max_prompt_length 5, max_completion_length 4, max_length 10 (keep_start): "
        "1 prompt and 1 answer, 8 tokens in all"
    )


def test_many_rows_are_shortened_for_people():
    rows = [ids_row(10, 1, 1)] * 30 + [ids_row(1, 1, 1)]
    report = report_of(rows)
    assert report.lines()[1].endswith("(rows from 0: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (20 more))")
    assert len(report.as_dict()["left_out"]["no room for an answer"]) == 30
