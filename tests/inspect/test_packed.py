"""What `dpofast inspect --step` prints of a packed row."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dpofast.data.packing.collate import Layout
from dpofast.data.packing.plan import PlannedStep
from dpofast.data.packing.step_dataset import StepDataset
from dpofast.inspect.packed import render_packed
from dpofast.inspect.row_parts import row_units
from tests.data.builders import byte_bpe

ids = st.lists(st.integers(3, 5), min_size=1, max_size=6)
pairs = st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=4)


def laid_out(some_pairs, layout="shared"):
    answers = [(prompt, answer) for prompt, *both in some_pairs for answer in both]
    return Layout(layout).collate(answers, [0.0] * len(answers))


@given(pairs, st.sampled_from(["shared", "unshared"]))
def test_parts_tile_the_row_and_say_where_each_answer_is_scored(some_pairs, layout):
    batch = laid_out(some_pairs, layout)
    units = row_units(batch)
    assert [unit.pairs for unit in units] == [[pair] for pair in range(len(some_pairs))]
    parts = [part for unit in units for part in unit.parts]
    assert sum(part.length for part in parts) == batch.num_body_tokens
    place = 0
    scored = {}
    for part in parts:
        assert part.start == place
        place += part.length
        expected = torch.arange(part.position, part.position + part.length)
        assert torch.equal(batch.position_ids[0, part.start : place], expected)
        if part.name != "prefix":
            answer = 2 * part.unit + (part.name == "rejected")
            runs = [torch.arange(first, final + 1) for first, final in part.scored]
            scored[answer] = torch.cat(runs)
            assert all(run[0] - before[-1] > 1 for before, run in pairwise(runs))
    assert sorted(scored) == list(range(2 * len(some_pairs)))
    for answer, places in scored.items():
        start, end = batch.bounds[answer : answer + 2]
        assert torch.equal(places, batch.scored_positions[start:end])


def printed(some_pairs, layout="shared", **options):
    batch = laid_out(some_pairs, layout)
    examples = [
        {"row": 7 * index, "prompt_ids": prompt} for index, (prompt, _, _) in enumerate(some_pairs)
    ]
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        console.print(render_packed(batch, examples, byte_bpe(), **options))
    return [line.rstrip() for line in capture.get().splitlines()]


def tokens(text):
    return byte_bpe()(text, add_special_tokens=False)["input_ids"]


PAIRS = [
    (tokens("ab"), tokens("cd"), tokens("ce")),
    (tokens("f"), tokens("g"), tokens("gh")),  # rejected begins with all of chosen
]


def test_a_shared_row():
    lines = printed(PAIRS)
    assert lines == [
        "2 pairs in 8 tokens (13 one sequence at a time), 7 scored",
        "pair  part      tokens  in the row  positions  scored from",
        "   0  prefix         3         0-2        0-2",
        "      chosen         1           3          3  1-2",
        "      rejected       1           4          3  1-2",
        "   7  prefix         2         5-6        0-1",
        "      chosen         0           -          -  5",
        "      rejected       1           7          2  5-6",
        "",
        "who (line) looks at whom (column); a cell is a token wide and high",
        "0 prefix   │█▄",
        "0 chosen   │███▄",
        "0 rejected │▀▀▀ ▀▄",
        "7 rejected │     ██▄",
        "",
        "pair 0",
        "prompt (2)     a|b",
        "both begin (1) c",
        "chosen (1)     d",
        "rejected (1)   e",
        "pair 7",
        "prompt (1)     f",
        "both begin (1) g",
        "rejected (1)   h",
    ]


def test_an_unshared_row_has_every_sequence_for_itself():
    lines = printed(PAIRS, "unshared")
    assert lines[:6] == [
        "2 pairs in 13 tokens (13 one sequence at a time), 7 scored",
        "pair  part      tokens  in the row  positions  scored from",
        "   0  chosen         4         0-3        0-3  1-2",
        "      rejected       4         4-7        0-3  5-6",
        "   7  chosen         2         8-9        0-1  8",
        "      rejected       3       10-12        0-2  10-11",
    ]
    assert lines[-9:] == [
        "prompt (2)   a|b",
        "chosen (2)   c|d",
        "prompt (2)   a|b",
        "rejected (2) c|e",
        "pair 7",
        "prompt (1)   f",
        "chosen (1)   g",
        "prompt (1)   f",
        "rejected (2) g|h",
    ]


def test_a_window_that_cuts_something_off_gets_a_picture_of_its_own():
    assert "layers with a window look back over 3 tokens:" in printed(PAIRS, window=3)
    assert not [line for line in printed(PAIRS, window=4) if "window" in line]


def test_so_do_chunks_that_do():
    assert "layers with chunks look at their own chunk of 3 tokens:" in printed(PAIRS, chunk=3)
    assert not [line for line in printed(PAIRS, chunk=4) if "chunk" in line]


def test_long_parts_are_shortened():
    lines = printed([(tokens("a" * 50), tokens("b"), tokens("c"))], max_tokens=4)
    assert "prompt (50)  a|a ... 46 tokens ... a|a" in lines


@pytest.mark.parametrize("layout", ["shared", "unshared"])
def test_a_row_without_pairs_says_so(layout):
    assert printed([], layout) == ["no pairs: one token runs along, and nothing is scored"]


def test_the_picture_of_many_pairs_is_no_wider_than_the_terminal():
    prompt, answers = tokens("ab"), [tokens(text) for text in ("cd", "ce", "df", "e", "fgh", "h")]
    pairs = Dataset.from_list(
        [
            {"prompt_ids": prompt, "chosen_ids": one, "rejected_ids": other}
            for one, other in combinations(answers, 2)
        ]
    )
    steps = StepDataset(pairs, np.zeros((15, 2)), Layout("shared"))
    step = steps.__getitems__(PlannedStep(([*range(15)],), 15))
    examples = [{"row": 1000 + pair, "prompt_ids": prompt} for pair in step.indices[0]]
    console = Console(width=64, no_color=True)
    with console.capture() as capture:
        console.print(render_packed(step.micro_batches[0], examples, byte_bpe()))
    lines = capture.get().splitlines()
    picture = [line for line in lines if "│" in line]
    assert picture[0].startswith("1000 and 14 more prefix   │█")
    assert len(picture) >= 6
    first = lines.index(picture[0])
    assert lines[first : first + len(picture)] == picture, "no line is broken"


def test_a_group_of_several_pairs_names_its_answers():
    prompt, answers = tokens("ab"), [tokens(text) for text in ("cd", "ce", "cef")]
    pairs = Dataset.from_list(
        [
            {"prompt_ids": prompt, "chosen_ids": answers[one], "rejected_ids": answers[other]}
            for one, other in [(0, 1), (2, 0)]
        ]
    )
    steps = StepDataset(pairs, np.zeros((2, 2)), Layout("shared"))
    (batch,) = steps.__getitems__(PlannedStep(([0, 1],), 2)).micro_batches
    examples = [{"row": row, "prompt_ids": prompt} for row in (4, 9)]
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        console.print(render_packed(batch, examples, byte_bpe()))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert lines[:6] == [
        "2 pairs in 7 tokens (17 one sequence at a time), 7 scored",
        "pair  part      tokens  in the row  positions  scored from",
        "4, 9  prefix         3         0-2        0-2",
        "      answer 1       1           3          3  1-2",
        "      answer 2       1           4          3  1-2",
        "      answer 3       2         5-6        3-4  1-2, 5",
    ]
    assert lines[-9:] == [
        "",
        "pairs 4, 9",
        "answer 1 over answer 2",
        "answer 3 over answer 1",
        "prompt (2)    a|b",
        "all begin (1) c",
        "answer 1 (1)  d",
        "answer 2 (1)  e",
        "answer 3 (2)  e|f",
    ]
