"""The race of prompts with several answers: groups run what is planned and train the same."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import takewhile

import pytest

from benchmarks import program, train
from benchmarks.harness import ABSENT, TIMED
from benchmarks.train import ANSWERS, benchmark, case_of, parse, planned_counts, program_of
from benchmarks.train_cases import Case, Work, prepare, race_case, tiny, with_answers
from benchmarks.train_child import run
from benchmarks.train_contenders import OF_ANSWERS
from tests.racing import Children, compare

CASE = tiny(with_answers(race_case(), 4))
BATCH = CASE.fixed_batch


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    prepare(CASE, folder, None)
    return Work(folder, "cpu", BATCH, CASE.steps)


@pytest.fixture(scope="module")
def truth(work):
    return run("naive", work)


def timed_steps(work):
    """The pairs of each timed step: (prompt, chosen, rejected) ids."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [tuple(tuple(pair[name]) for name in names) for pair in work.timed_pairs]
    starts = range(0, len(pairs), CASE.pairs_per_step)
    return [pairs[start : start + CASE.pairs_per_step] for start in starts]


def group_tokens(prompt, answers):
    """Tokens of a group: what all of its sequences begin with once, then the rest of each."""
    sequences = [prompt + answer for answer in answers]
    shared = list(takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False)))
    return sum(map(len, sequences)) - (len(sequences) - 1) * len(shared)


def counts_of(groups):
    return {
        "body_tokens": sum(group_tokens(*group) for group in groups),
        "head_rows": sum(len(answer) for _, answers in groups for answer in answers),
    }


def grouped_counts(work):
    groups = []
    for step in timed_steps(work):
        answers = {}
        for prompt, *both in step:
            answers.setdefault(prompt, set()).update(both)
        groups += [(prompt, sorted(each)) for prompt, each in answers.items()]
    assert len(groups) == CASE.prompts == 4
    assert all(len(each) == 4 for _, each in groups)
    return counts_of(groups)


def ungrouped_counts(work):
    return counts_of([(prompt, both) for step in timed_steps(work) for prompt, *both in step])


@pytest.mark.parametrize(
    ("name", "expected"), [("grouped", grouped_counts), ("ungrouped", ungrouped_counts)]
)
def test_ours_trains_the_same_on_what_was_planned(name, expected, work, truth):
    found = run(name, work)
    compare(found, truth, CASE)
    assert found["counts"] == planned_counts(work, name) == expected(work)


def test_groups_run_a_third_of_the_head_rows(work):
    grouped, ungrouped = grouped_counts(work), ungrouped_counts(work)
    assert ungrouped["head_rows"] == 3 * grouped["head_rows"]
    assert ungrouped["body_tokens"] > 3 * grouped["body_tokens"]


def test_groups_that_exceed_a_row_are_counted_as_they_are_cut(tmp_path):
    case = replace(CASE, max_tokens=24)
    prepare(case, tmp_path, None)
    work = Work(tmp_path, "cpu", BATCH, case.steps)
    planned, whole = planned_counts(work, "grouped"), grouped_counts(work)
    assert all(planned[name] > whole[name] for name in whole)
    found = run("grouped", work)
    compare(found, run("naive", work), case)
    assert found["counts"] == planned


def write(monkeypatch, tmp_path, children, *arguments):
    """Run the command line with these children: exit code and JSON."""
    file = tmp_path / "results" / "train.json"
    monkeypatch.setattr(program, "child_runner", lambda *_: children)
    planned = {"body_tokens": 10, "head_rows": 5}
    monkeypatch.setattr(train, "planned_counts", lambda *_: planned)
    given = ["--device", "cpu", "--answers", "4", "--dry-run", "--json", str(file), *arguments]
    return benchmark(parse(given)), json.loads(file.read_text())


def test_what_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(program, "has_targets", lambda _: True)
    code, given = write(monkeypatch, tmp_path, Children())
    assert code == 0
    assert (given["benchmark"], given["ours"]) == ("train", "grouped")
    speeds = {name: given["ratios"][f"{name}_speed"] for name in ("ungrouped", "trl", "naive")}
    assert speeds == {"ungrouped": 4.0, "trl": 2.0, "naive": 8.0}
    assert (given["ratios"]["trl_memory"], given["ratios"]["naive_memory"]) == (1.0, 0.5)
    assert set(given["planned_counts"]) == {"grouped", "ungrouped"}
    assert set(given["contenders"]) == set(OF_ANSWERS)
    assert (given["case"]["answers"], given["case"]["pairs_per_step"]) == (4, 12)
    assert given["contenders"]["naive"]["pairs_per_second"] == 2 * 12 / 8.0
    bounds = {name: (each["bound"], each["holds"]) for name, each in given["targets"].items()}
    assert bounds == {
        "ungrouped_speed": (2.5, True),
        "trl_speed": (8.0, False),
        "naive_speed": (12.0, False),
    }
    assert "2 steps of 12 pairs (4 answers to a prompt)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "children",
    [
        Children(grouped={"losses": [0.7, 0.7, 0.7001]}),
        Children(grouped={"counts": {"body_tokens": 10, "head_rows": 6}}),
        Children(ungrouped={"counts": {"body_tokens": 11, "head_rows": 5}}),
    ],
    ids=["wrong", "miscounted", "ungrouped miscounted"],
)
def test_what_ends_with_exit_code_1(children, monkeypatch, tmp_path):
    assert write(monkeypatch, tmp_path, children)[0] == 1


def test_the_race_on_a_cpu_is_the_one_that_is_described():
    options = parse(["--device", "cpu", "--answers", "4"])
    sizes = (1, 2, 4, 8)
    assert program_of(options) is ANSWERS
    case = case_of(options)
    assert case == Case(
        "race",
        answers=4,
        pairs_per_step=24,
        steps=2,
        max_tokens=4096,
        batch_sizes={"trl": sizes, "trl_compact": sizes},
    )
    assert (case.prompts, case.fixed_batch, case.batches_of("trl")) == (8, 4, sizes)


@pytest.mark.parametrize(
    ("answers", "pairs", "batch"), [(3, 24, 4), (5, 20, 4), (6, 15, 3), (7, 21, 3), (9, 36, 4)]
)
def test_other_numbers_of_answers_have_no_targets(answers, pairs, batch):
    options = parse(["--device", "cpu", "--answers", str(answers)])
    case = case_of(options)
    assert (case.answers, case.pairs_per_step, case.fixed_batch) == (answers, pairs, batch)
    found = program_of(options)
    assert (found.at_least, found.at_most, found.contest) == ({}, {}, ANSWERS.contest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--answers 1", "Pairs need at least 2 answers to a prompt, not 1."),
        ("--answers 4 --contenders shared", "shared takes no part in a race with --answers 4"),
        ("--skip grouped", "grouped takes no part in a race with --answers 2"),
        (
            "--device cuda --answers 4 --pairs-per-step 32",
            "Steps of 32 pairs can't be made of whole prompts, which have 6 pairs each.",
        ),
    ],
)
def test_what_cannot_be_raced_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(["--device", "cpu", *arguments.split()])
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.torture)])
def test_a_dry_run_with_everyone(device, tmp_path):
    file = tmp_path / "train.json"
    given = ["--device", device, "--answers", "4", "--dry-run", "--json", str(file)]
    assert benchmark(parse(given)) == 0
    contenders = json.loads(file.read_text())["contenders"]
    absent = {"cpu": {"trl_plain"}, "cuda": {"trl_compact"}}[device]
    assert {name for name in contenders if contenders[name]["status"] == ABSENT} == absent
    assert {contenders[name]["status"] for name in contenders.keys() - absent} == {TIMED}
