"""The race of reference log-probs: all score the same, and wrong results get no speed."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import takewhile

import numpy as np
import pytest

from benchmarks import program, reference
from benchmarks.harness import ABSENT, TIMED, WRONG, Result
from benchmarks.reference import CONTEST, benchmark, case_of, parse, planned_counts
from benchmarks.reference_cases import BATCH_SIZES, ReferenceCase, ReferenceWork, race_case, tiny
from benchmarks.reference_child import run
from benchmarks.rounds import Race, Standing
from benchmarks.train_cases import prepare

CASE = tiny(race_case())
NAMES = ("prompt_ids", "chosen_ids", "rejected_ids")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    prepare(CASE, folder, None)
    return ReferenceWork(folder, "cpu", 2, CASE.steps)


@pytest.fixture(scope="module")
def truth(work):
    return run("naive", work)


@pytest.fixture
def stock_trl(monkeypatch):
    """Undo the changes that the contender makes to TRL in its own process."""
    utils = pytest.importorskip("trl.trainer.utils")
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)


def compare(found, truth):
    assert "reason" not in found
    standing = Standing(Result("it", ""), num_pairs=1, runs=[found])
    standing.judge(truth, CASE.tolerances)
    assert standing.result.status == TIMED, standing.result.reason
    assert found["seconds"] > 0.0


def pairs(work):
    """(prompt, chosen, rejected) ids of the scored pairs."""
    return [[pair[name] for name in NAMES] for pair in work.timed_pairs]


def padded_tokens(work, size):
    longest = [len(p) + max(len(c), len(r)) for p, c, r in pairs(work)]
    starts = range(0, len(longest), size)
    parts = [longest[start : start + size] for start in starts]
    return sum(2 * len(part) * max(part) for part in parts)


def test_naive_scores_each_answer_in_the_order_of_the_pairs(work, truth):
    alone = run("naive", replace(work, batch_size=1))
    assert len(truth["logps"]) == 2 * CASE.pairs_per_step
    np.testing.assert_allclose(truth["logps"], alone["logps"], rtol=1e-5)
    assert len(set(truth["logps"])) == len(truth["logps"])
    for found, size in ((truth, 2), (alone, 1)):
        tokens = padded_tokens(work, size)
        assert found["counts"] == {"body_tokens": tokens, "head_rows": tokens}


def test_ours_scores_the_same_on_what_was_planned(work, truth):
    found = run("ours", work)
    compare(found, truth)
    both = [list(zip(p + c, p + r, strict=False)) for p, c, r in pairs(work)]
    shared = sum(len(list(takewhile(lambda ids: ids[0] == ids[1], each))) for each in both)
    answers = sum(len(c) + len(r) for _, c, r in pairs(work))
    body_tokens = sum(2 * len(p) for p, *_ in pairs(work)) + answers - shared
    expected = {"body_tokens": body_tokens, "head_rows": answers}
    assert found["counts"] == planned_counts(work) == expected
    assert found["attention"] == "sdpa"


@pytest.mark.peer
def test_trl_scores_the_same_again_in_each_process(work, truth, stock_trl):
    tokens = padded_tokens(work, 2)
    for _ in range(2):  # the second run finds nothing in a cache
        found = run("trl", work)
        compare(found, truth)
        assert found["counts"]["body_tokens"] == tokens


@pytest.mark.peer
def test_trl_counts_all_rows_but_each_sequences_last(work, stock_trl):
    rows = run("trl", work)["counts"]["head_rows"]
    assert rows == padded_tokens(work, 2) - 2 * CASE.pairs_per_step


class Children:
    """Replaces the processes: gives the report of each contender."""

    def __init__(self, **changes):
        self.changes, self.calls = changes, []

    def __call__(self, name, batch_size, steps):
        self.calls.append((name, batch_size))
        found = {
            "seconds": {"ours": 2.0, "naive": 8.0}.get(name, 6.0 if batch_size == 1 else 5.0),
            "logps": [-20.0, -30.0],
            "counts": {"body_tokens": 10, "head_rows": 5},
            "peak_bytes": 1.0e9 if name == "ours" else 2.0e9,
            "attention": "sdpa",
        }
        return {**found, **self.changes.get(name, {})}


def test_speed_is_of_all_pairs_at_the_best_batch_size_of_trl():
    children = Children()
    race = Race(CONTEST, CASE, children, {})
    race.choose_batches()
    for number in range(2):
        race.run_round(number)
    names = ["ours", "trl", "naive"]
    assert children.calls[:2] == [("trl", 1), ("trl", 2)]
    assert [name for name, _ in children.calls[2:]] == [*names, *names[1:], names[0]]
    assert race.standings["trl"].batch_size == 2
    assert race.standings["trl"].tried == {1: 8 / 6.0, 2: 8 / 5.0}
    ratios, why = race.ratios()
    expected = {"trl_speed": 2.5, "naive_speed": 4.0, "trl_memory": 0.5, "naive_memory": 0.5}
    assert (ratios, why) == (expected, {})


def write(monkeypatch, tmp_path, children, *arguments):
    """Run the command line with these children: exit code and JSON."""
    file = tmp_path / "results" / "reference.json"
    monkeypatch.setattr(program, "child_runner", lambda *_: children)
    planned = {"body_tokens": 10, "head_rows": 5}
    monkeypatch.setattr(reference, "planned_counts", lambda *_: planned)
    code = benchmark(parse(["--device", "cpu", "--dry-run", "--json", str(file), *arguments]))
    return code, json.loads(file.read_text())


def test_what_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(program, "has_targets", lambda _: True)
    code, given = write(monkeypatch, tmp_path, Children(), "--rounds", "2")
    assert code == 0
    assert (given["benchmark"], given["ours"]) == ("reference", "ours")
    assert (given["ratios"]["trl_speed"], given["ratios"]["trl_memory"]) == (2.5, 0.5)
    assert given["planned_counts"] == {"ours": {"body_tokens": 10, "head_rows": 5}}
    assert all(target["holds"] for target in given["targets"].values())
    assert given["contenders"]["trl"]["rounds"] == 2
    assert given["max_tokens_per_microbatch"] == given["case"]["max_tokens"] == CASE.max_tokens
    assert "trl_speed 2.50, at least 1.5: holds" in capsys.readouterr().out


def test_wrong_log_probs_get_no_speed(monkeypatch, tmp_path):
    code, given = write(monkeypatch, tmp_path, Children(trl={"logps": [-20.0, -30.001]}))
    assert code == 0
    assert given["contenders"]["trl"]["status"] == WRONG
    assert given["ratios"]["trl_speed"] is None
    assert given["ratio_reasons"]["trl_speed"].startswith("trl: error of logps 3.33e-05")


@pytest.mark.parametrize(
    "change",
    [
        {"logps": [-20.0, -30.001]},
        {"logps": [-20.0, float("nan")]},
        {"counts": {"body_tokens": 11, "head_rows": 5}},
    ],
    ids=["wrong", "nan", "miscounted"],
)
def test_what_ends_with_exit_code_1(change, monkeypatch, tmp_path):
    assert write(monkeypatch, tmp_path, Children(ours=change))[0] == 1


def test_the_race_on_a_cpu_is_the_one_that_is_described():
    case = case_of(parse(["--device", "cpu"]))
    assert case == ReferenceCase("race", batch_sizes={"trl": (1, 2, 4, 8, 16)})
    assert (case.data, case.pairs_per_step, case.max_length) == ("dpo_en_demo", 100, 4096)
    assert (case.dtype, case.max_tokens, case.fixed_batch) == ("float32", 2048, 1)


def test_shapes_for_a_gpu():
    case = case_of(parse(["--device", "cuda", "--shape", "7b"]))
    assert (case.shape, case.dtype, case.pairs_per_step) == ("7b", "bfloat16", 100)
    assert case.batches_of("trl") == case.batches_of("naive") == BATCH_SIZES


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_dry_run_with_everyone(device, tmp_path):
    file = tmp_path / "reference.json"
    arguments = ["--device", device, "--dry-run", "--threads", "1", "--json", str(file)]
    assert benchmark(parse(arguments)) == 0
    given = json.loads(file.read_text())
    assert {each["status"] for each in given["contenders"].values()} == {TIMED}
    assert given["counts"]["ours"] == given["planned_counts"]["ours"]
    assert given["ratios"]["trl_speed"] > 0.0


@pytest.mark.slow  # starts several processes
def test_a_dry_run_in_processes_of_their_own(tmp_path):
    file = tmp_path / "reference.json"
    arguments = ["--dry-run", "--skip", "trl", "--threads", "1", "--json", str(file)]
    assert benchmark(parse(["--device", "cpu", *arguments])) == 0
    given = json.loads(file.read_text())
    assert given["contenders"]["trl"]["status"] == ABSENT
    assert given["ratios"]["naive_speed"] > 0.0
    assert given["counts"]["ours"] == given["planned_counts"]["ours"]
