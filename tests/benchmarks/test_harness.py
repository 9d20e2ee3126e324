"""Races are fair, wrong results get no speed, and contenders that can't run say why."""

from __future__ import annotations

import json
import math
import subprocess
import time
import types
from contextlib import contextmanager
from typing import ClassVar

import pytest

from benchmarks.harness import (
    ABSENT,
    FAILED,
    TIMED,
    WRONG,
    AbsentError,
    Contender,
    CudaClock,
    Result,
    TimeLimitError,
    Verdict,
    attempt,
    make_contender,
    quantile,
    race,
    ratios,
    rotated,
    time_limit,
    time_ratios,
    wall_clock,
    worst,
)
from benchmarks.memory import measure_in_child, peak_beyond_baseline
from benchmarks.stamps import git_state, stamps
from benchmarks.tables import print_peaks, print_times

MEBIBYTE = 2**20


def judge(given):
    return Verdict({"value": abs(given - 1.0)}, {"value": 0.1})


def attempts_of(contenders):
    return {each.name: attempt(each, judge, limit_seconds=60.0) for each in contenders}


class Calls:
    """Contenders that record their calls, and a clock with a fixed time for each of them."""

    def __init__(self):
        self.made, self.seconds = [], {}

    def contender(self, name, seconds=1.0):
        self.seconds[name] = seconds
        return Contender(name, lambda: self.made.append(name) or 1.0)

    def clock(self, run):
        run()
        return self.seconds[self.made[-1]]


def raise_error(message):
    raise RuntimeError(message)


class _FakeEvent:
    """A CUDA event that notes when it is recorded, and is 5 ms from any other."""

    notes: ClassVar[list[str]] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.notes.append("event")

    def synchronize(self):
        self.notes.append("wait")

    def elapsed_time(self, _):
        return 5.0


def test_a_device_waits_until_the_host_is_ahead(monkeypatch):
    notes = _FakeEvent.notes
    notes.clear()
    flush = types.SimpleNamespace(zero_=lambda: notes.append("flush"))
    monkeypatch.setattr("torch.empty", lambda *_, **__: flush)
    monkeypatch.setattr("torch.cuda.Event", _FakeEvent)
    monkeypatch.setattr("torch.cuda._sleep", lambda cycles: notes.append("sleep"))
    assert CudaClock()(lambda: notes.append("run")) == 5e-3
    assert notes == ["flush", "sleep", "event", "run", "event", "wait"]


def test_rounds_are_interleaved_and_start_with_another_each():
    calls = Calls()
    contenders = [calls.contender(name) for name in "abc"]
    attempts = attempts_of(contenders)
    calls.made.clear()
    race(contenders, attempts, calls.clock, rounds=3, warmup=1)
    # The warm-up round has number -1.
    assert calls.made == [*"cab", *"abc", *"bca", *"cab"]
    assert {len(result.seconds) for result in attempts.values()} == {3}


def test_rotation():
    assert rotated("abcd", 6) == [*"cdab"]
    assert rotated("abcd", -1) == [*"dabc"]
    assert rotated("", 3) == []


def test_warmup_rounds_do_not_count_and_medians_do():
    taken = iter([100.0, 5.0, 1.0, 3.0])
    contender = Contender("a", lambda: 1.0)
    attempts = attempts_of([contender])
    race([contender], attempts, lambda run: next(taken), rounds=3, warmup=1)
    given = attempts["a"].as_dict()
    assert (given["seconds"], given["median"], given["rounds"]) == ([5.0, 1.0, 3.0], 3.0, 3)
    assert (given["p20"], given["p80"]) == (pytest.approx(1.8), pytest.approx(4.2))


def test_quantiles():
    assert quantile([], 0.5) is None
    assert quantile([2.0], 0.8) == 2.0
    assert quantile([3.0, 1.0], 0.5) == 2.0


def test_a_wrong_contender_gets_no_speed():
    calls = Calls()
    contenders = [Contender("wrong", lambda: 2.0), calls.contender("right")]
    attempts = attempts_of(contenders)
    race(contenders, attempts, calls.clock, rounds=2, warmup=1)
    wrong = attempts["wrong"]
    assert (wrong.status, wrong.median, wrong.seconds) == (WRONG, None, [])
    assert wrong.reason == "error of value 1.00e+00, at most 1.00e-01"
    assert wrong.as_dict()["errors"] == {"value": 1.0}
    assert attempts["right"].status == TIMED


def test_nan_is_wrong():
    contender = Contender("nan", lambda: math.nan)
    assert attempt(contender, judge, 60.0).status == WRONG


def test_a_contender_that_raises_ends_nothing():
    calls = Calls()
    contenders = [
        Contender("raises", lambda: raise_error("no kernel\nand a long trace")),
        calls.contender("runs"),
    ]
    attempts = attempts_of(contenders)
    race(contenders, attempts, calls.clock, rounds=2, warmup=0)
    assert attempts["raises"].status == FAILED
    assert attempts["raises"].reason == "RuntimeError: no kernel"
    assert len(attempts["runs"].seconds) == 2


def test_a_contender_that_raises_late_loses_its_times():
    given = iter([1.0, 1.0])  # enough for its attempt and one round
    contenders = [Contender("tires", lambda: next(given)), Contender("runs", lambda: 1.0)]
    attempts = attempts_of(contenders)
    race(contenders, attempts, wall_clock, rounds=3, warmup=0)
    assert (attempts["tires"].status, attempts["tires"].seconds) == (FAILED, [])
    assert attempts["tires"].reason == "StopIteration"
    assert len(attempts["runs"].seconds) == 3


def test_what_cannot_be_made_says_why():
    def missing_package():
        import a_package_that_nobody_has  # noqa: F401

    def no_gpu():
        raise AbsentError("needs a GPU")

    made = [make_contender("a", missing_package), make_contender("b", no_gpu)]
    attempts = attempts_of(made)
    assert {result.status for result in attempts.values()} == {ABSENT}
    assert attempts["a"].reason.startswith("ModuleNotFoundError: No module named")
    assert attempts["b"].reason == "needs a GPU"


def test_a_judge_that_raises_fails_the_contender():
    result = attempt(Contender("a", lambda: None), lambda given: raise_error("lacks logps"), 60.0)
    assert (result.status, result.reason) == (FAILED, "RuntimeError: lacks logps")


def test_what_a_round_finds_ready_is_made_outside_its_time_and_given_back():
    events = []

    @contextmanager
    def holding():
        events.append("made")
        yield
        events.append("given back")

    def clock(run):
        events.append("clock")
        run()
        return 1.0

    floor = Contender("floor", lambda: events.append("run"), judged=False, holding=holding)
    other = Contender("other", lambda: events.append("other") or 1.0)
    attempts = attempts_of([floor, other])
    assert events == ["made", "run", "given back", "other"]
    events.clear()
    race([floor, other], attempts, clock, rounds=1, warmup=0)
    assert events == ["made", "clock", "run", "given back", "clock", "other"]


def test_memory_that_cannot_be_had_fails_the_contender():
    @contextmanager
    def holding():
        raise_error("out of memory")
        yield

    contenders = [Contender("floor", lambda: None, judged=False, holding=holding)]
    attempts = attempts_of(contenders)
    assert (attempts["floor"].status, attempts["floor"].reason) == (
        FAILED,
        "RuntimeError: out of memory",
    )


def test_what_is_not_judged_is_timed():
    contender = Contender("floor", lambda: None, judged=False)
    assert attempt(contender, judge, 60.0).status == TIMED


def test_a_first_call_that_takes_too_long_is_ended():
    result = attempt(Contender("slow", lambda: time.sleep(30)), judge, limit_seconds=0.05)
    assert (result.status, result.reason) == (FAILED, "TimeLimitError: took longer than 0.05 s")
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # no alarm is left behind
    with pytest.raises(TimeLimitError), time_limit(0.02):
        time.sleep(30)


def test_ratios_are_ours_over_theirs_with_a_reason_where_there_is_none():
    results = {
        "ours": Result("ours", "", seconds=[2.0, 1.0, 3.0]),
        "slow": Result("slow", "", seconds=[4.0]),
        "gone": Result("gone", "", status=ABSENT, reason="needs a GPU"),
    }
    found, why = time_ratios(results, "ours", "time")
    assert found == {"slow_time": 0.5, "gone_time": None}
    assert why == {"gone_time": "gone: needs a GPU"}


def test_no_ratio_without_ours_or_by_nothing():
    reasons = {"ours": "wrong", "slow": None}
    assert ratios({"ours": None, "slow": 1.0}, reasons, "ours", "time") == (
        {"slow_time": None},
        {"slow_time": "ours: wrong"},
    )
    found, why = ratios({"ours": 1.0, "slow": 0.0}, {}, "ours", "time")
    assert found == {"slow_time": None}
    assert why == {"slow_time": "slow: measured nothing above zero"}


def test_the_worst_of_several_cases():
    assert worst([{"a": 0.5, "b": None}, {"a": 0.7, "b": None}, {"b": 0.1}]) == {"a": 0.7, "b": 0.1}
    assert worst([{"a": None}]) == {"a": None}


def test_peak_counts_what_a_call_holds_and_frees():
    size = 64 * MEBIBYTE
    peak = peak_beyond_baseline(lambda: len(bytearray(b"\1" * size)), "cpu")
    assert 1.9 * size < peak < 2.5 * size  # the OS counts some pages late
    # The earlier peak has been reset.
    assert peak_beyond_baseline(lambda: len(b"\1" * size), "cpu") < 1.5 * size


def test_children_report_lines_and_their_end(tmp_path, monkeypatch):
    (tmp_path / "a_child.py").write_text(
        "import os, sys\n"
        "print('{\"peak\": 3}')\n"
        "print('chatter', flush=True)\n"
        "if sys.argv[1] == 'killed': os.kill(os.getpid(), 9)\n"
        "if sys.argv[1] == 'raises': raise ValueError('too wide')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert measure_in_child("a_child", ["fine"], 60.0) == ([{"peak": 3}], None)
    assert measure_in_child("a_child", ["killed"], 60.0) == ([{"peak": 3}], "ended by SIGKILL")
    found, reason = measure_in_child("a_child", ["raises"], 60.0)
    assert (found, reason) == ([{"peak": 3}], "exit code 1: ValueError: too wide")


def test_a_child_that_takes_too_long(tmp_path, monkeypatch):
    (tmp_path / "a_sleeper.py").write_text("import time\ntime.sleep(30)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert measure_in_child("a_sleeper", [], 0.3) == ([], "took longer than 0.3 s")


def test_stamps_say_when_where_and_with_what(tmp_path):
    given = json.loads(json.dumps(stamps("benchmarks.head")))
    assert set(given) == {"date", "command", "git", "hardware", "versions"}
    assert given["command"].startswith("python -m benchmarks.head")
    assert given["date"].endswith("+00:00")
    assert {"devices", "threads", "cpu_count"} <= set(given["hardware"])
    assert {"torch", "trl", "liger-kernel", "cut-cross-entropy"} <= set(given["versions"])
    assert git_state(tmp_path) == {"commit": None, "dirty": None}


def test_git_state_sees_changes(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "new").touch()
    assert git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}


def test_tables_show_times_ratios_errors_and_reasons(capsys):
    results = {
        "ours": Result("ours", "", verdict=Verdict({"a": 1e-6}, {"a": 1e-3}), seconds=[0.5]),
        "gone": Result("gone", "", status=ABSENT, reason="needs a GPU"),
    }
    print_times("a race", results, {"gone_time": None}, "time", flop=1e12)
    print_peaks(
        "memory",
        {"ours": {"beyond_inputs_and_gradients": 10**9}, "gone": {"reason": "needs a GPU"}},
        {"gone_memory": None},
    )
    shown = capsys.readouterr().out
    for text in ("a race", "500.00", "2.00", "a 1.0e-06 / 1.0e-03", "absent: needs a GPU", "1.000"):
        assert text in shown
