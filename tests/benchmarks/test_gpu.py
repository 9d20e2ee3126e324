"""The run on a GPU: its stages, their limits, and what they leave when something goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import REPOSITORY, attention, head, reference, train, train_cases
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import ceilings, step_profile
from benchmarks.gpu.ceilings import Probe
from benchmarks.gpu.device_tests import Outcomes
from benchmarks.gpu.runner import run_stages, write_whole
from benchmarks.gpu.stages import PARTS, SHAPES, Stage, stages_of
from benchmarks.gpu.step_profile import kernel_times
from benchmarks.report import read_figures
from tests import liger

# A stage: writes JSON, starts a process of its own, and then does what its first argument says.
FAKE = """
import os, signal, subprocess, sys, time
what, file = sys.argv[1], sys.argv[3]
print("this is", what)
if what != "silent":
    open(file, "w").write("{\\"found\\": 1" if what == "half" else "{\\"found\\": 1}")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(file + ".pid", "w").write(str(child.pid))
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if what in ("slow", "half"):
    time.sleep(60)
sys.exit(3 if what == "silent" else 0)
"""


def has_ended(pid):
    """Whether a process ends within seconds; one that nobody has waited for yet is a zombie."""
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


FATES = {
    "killed": ("failed", "ended by SIGKILL", {"found": 1}),
    "slow": ("out of time", "took longer than 5 s", {"found": 1}),
    "half": ("out of time", "took longer than 5 s", None),
    "silent": ("failed", "exit code 3", None),
    "good": ("done", None, {"found": 1}),
}


@pytest.mark.parametrize(
    "names",
    [("killed", "silent", "good"), pytest.param(("slow", "half", "good"), marks=pytest.mark.slow)],
)
def test_whatever_becomes_of_one_stage_the_others_leave_their_results(names, tmp_path, capsys):
    (tmp_path / "fake_stage.py").write_text(FAKE)
    summary = {"part": "head", "stages": {}}
    for name in names:  # one at a time, so that none gets what another has left
        stage = Stage(name, 5.0 if name in ("slow", "half") else 60.0, "fake_stage", (name,))
        assert not run_stages([stage], tmp_path, {"PYTHONPATH": str(tmp_path)}, summary)
    written = json.loads((tmp_path / "head.json").read_text())
    for name in names:
        status, reason, result = FATES[name]
        outcome = written["stages"][name]
        assert (outcome["status"], outcome["reason"]) == (status, reason)
        given = json.loads((tmp_path / f"{name}.json").read_text())
        assert given == result if result else given["reason"] == reason
        assert f"this is {name}" in (tmp_path / f"{name}.log").read_text()
        assert has_ended((tmp_path / f"{name}.json.pid").read_text())
    assert "this is good" in capsys.readouterr().out


def test_a_stage_gets_what_earlier_ones_have_left(tmp_path):
    (tmp_path / "fake_stage.py").write_text("")
    stages = [Stage(name, 30.0, "fake_stage") for name in ("first", "second")]
    summary = {"part": "step", "stages": {}}
    assert run_stages(stages, tmp_path, {"PYTHONPATH": str(tmp_path)}, summary)
    first, second = (summary["stages"][name] for name in ("first", "second"))
    assert first["limit"] == 30.0
    assert second["limit"] == pytest.approx(60.0 - first["seconds"])


def test_a_quick_run_takes_ten_minutes_at_most():
    seconds = {
        part: sum(each.seconds for each in stages_of(part, "0.5b", is_quick=True, dry_run=False))
        for part in PARTS
    }
    assert seconds["head"] <= 360.0
    assert seconds["step"] <= 240.0


@pytest.mark.parametrize("is_quick", [True, False])
def test_the_benchmarks_take_their_arguments(is_quick):
    parsers = {
        "benchmarks.head": head.parse,
        "benchmarks.train": train.parse,
        "benchmarks.attention": attention.parse,
        "benchmarks.reference": reference.parse,
    }
    names = []
    for part in PARTS:
        for dry_run in (True, False):
            for stage in stages_of(part, "0.5b", is_quick=is_quick, dry_run=dry_run):
                names.append((stage.name, dry_run))
                own = stage.module.startswith("benchmarks.gpu.")
                assert own or stage.module in parsers
                assert own or ("--dry-run" in stage.arguments) == dry_run
                if dry_run and not own:
                    parsers[stage.module]([*stage.arguments, "--json", "x.json"])
    assert len(set(names)) == len(names)


def test_the_shapes_of_the_step_are_those_with_a_vocabulary():
    with_vocabulary = {
        name for name, (_, sizes) in train_cases.SHAPES.items() if "vocab_size" in sizes
    }
    assert set(SHAPES) == with_vocabulary


@pytest.mark.slow
def test_tests_run_without_the_plugins_of_pytest(tmp_path):
    """pyproject.toml has a setting of pytest-timeout, which not every GPU's machine has."""
    file = tmp_path / "tests.json"
    arguments = ["-p", "no:timeout", "--collect-only", "tests/gpu/test_head_gpu.py"]
    command = [sys.executable, "-m", "benchmarks.gpu.device_tests", *arguments]
    ended = subprocess.run([*command, "--json", str(file)], cwd=REPOSITORY, check=False)
    assert ended.returncode == 0


def test_without_a_gpu_a_dry_run_is_named(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, words in (
        (["--quick"], "try --dry-run"),
        (["--quick", "--dry-run", "--stages", "nonsense"], "there is no stage nonsense"),
        (["--quick", "--dry-run", "--shape", "70b"], "invalid choice: '70b'"),
        ([], "one of the arguments --quick --full is required"),
    ):
        with pytest.raises(SystemExit):
            program.main(arguments)
        assert words in capsys.readouterr().err


def test_the_summary_says_what_was_changed_for_rivals(tmp_path, monkeypatch):
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    out = tmp_path / "gpu"
    monkeypatch.setattr(
        program,
        "run_stages",
        lambda stages, folder, environment, summary: not write_whole(folder / "x.json", summary),
    )
    assert program.main(["--quick", "--dry-run", "--part", "step", "--out", str(out)]) == 0
    written = json.loads((out / "x.json").read_text())
    assert (written["part"], written["is_quick"], written["dry_run"]) == ("step", True, True)
    assert "pytorch#196678" in " ".join(written["notes"])
    assert program.environment(dry_run=True)["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in program.environment(dry_run=False)


def test_each_test_s_outcome_is_written_at_once(tmp_path):
    file = tmp_path / "tests.json"
    outcomes = Outcomes(file)

    def report(name, when, outcome, reason=""):
        outcomes.pytest_runtest_logreport(
            SimpleNamespace(
                **{"nodeid": name, "when": when, "outcome": outcome, "duration": 0.5},
                **{"passed": outcome == "passed", "failed": outcome == "failed"},
                longrepr=reason,
            )
        )

    report("a", "setup", "passed")
    assert not file.exists()
    report("a", "call", "passed")
    report("b", "setup", "skipped")
    report("c", "call", "failed", "line 1\nE  wrong")
    report("d", "call", "passed")
    report("d", "teardown", "failed", "broken")
    written = json.loads(file.read_text())
    assert written["counts"] == {"passed": 1, "skipped": 1, "failed": 2}
    assert written["tests"]["c"]["reason"] == "E  wrong"


def test_overlapping_kernels_keep_the_device_busy_once():
    def event(name, start, end, kind=DeviceType.CUDA, is_mark=False):
        span = SimpleNamespace(start=start, end=end)
        about = {"device_type": kind, "is_user_annotation": is_mark}
        return SimpleNamespace(name=name, time_range=span, **about)

    events = [
        *(event("b", 100.0, 200.0), event("a", 0.0, 50.0), event("a", 20.0, 120.0)),
        *(event("host", 0.0, 900.0, DeviceType.CPU), event("mark", 0.0, 900.0, is_mark=True)),
    ]
    kernels, busy = kernel_times(events)
    assert busy == pytest.approx(200e-6)
    assert [(each["name"], each["calls"]) for each in kernels] == [("a", 2), ("b", 1)]
    assert kernels[0]["seconds"] == pytest.approx(150e-6)


def test_a_rate_that_cannot_be_measured_is_noted(tmp_path, capsys):
    def broken(_):
        raise RuntimeError("no memory for inputs")

    probe = Probe(tmp_path / "ceilings.json", dry_run=True)
    probe.rate("right", 1e12, "TB/s", lambda: time.sleep(0.01))
    probe.rate("wrong", 1e12, "TB/s", lambda: torch.zeros(2) @ torch.zeros(3))
    probe.section(broken)
    written = json.loads((tmp_path / "ceilings.json").read_text())
    assert 0.0 < written["rates"]["right"]["rate"] < 100.0
    assert set(written["failures"]) == {"wrong", "broken"}
    assert "no memory" in capsys.readouterr().out


def test_ceilings_of_products(tmp_path):
    file = tmp_path / "ceilings.json"
    sections = ["copies", "casts", "products"]
    assert ceilings.main(["--dry-run", "--sections", *sections, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert len(written["rates"]) == 2 + 4 + 6
    assert all(each["seconds"] > 0.0 for each in written["rates"].values())
    assert read_figures(file) is None  # the README has no line for it


def test_a_sum_in_fp32_adds():
    left, right = torch.randn(4, 3).bfloat16(), torch.randn(3, 5).bfloat16()
    out = torch.ones(4, 5)
    ceilings._wide_sum(out, left, right)()
    torch.testing.assert_close(out, 1.0 + left.float() @ right.float())


def dry_run(folder, *arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--dry-run", "--out", str(folder)]
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    return subprocess.run(
        [*command, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )


def assert_whole(folder, names):
    for name in names:
        written = json.loads((folder / f"{name}.json").read_text())
        assert "stage" not in written, written  # else the stage has left no result of its own


def profile_with_liger(folder):
    step_profile.main(["--dry-run", "--liger", "--json", str(folder / "profile.json")])
    return json.loads((folder / "profile.json").read_text())


def test_a_profile_with_liger_s_layers_is_left_out_where_they_cannot_run(tmp_path, capsys):
    written = profile_with_liger(tmp_path)
    assert written["left_out"] == "Liger's layers need a GPU, and this process has none"
    assert "step_seconds" not in written
    assert "left out: Liger's layers" in capsys.readouterr().out


@pytest.mark.slow
def test_a_profile_with_liger_s_layers_runs_them_where_they_can(tmp_path, monkeypatch):
    liger.install_twins(monkeypatch)
    written = profile_with_liger(tmp_path)
    assert written["left_out"] is None
    assert "LigerRMSNorm" in written["liger_layers"]
    assert liger.calls["norm"] > 0


@pytest.mark.slow
def test_a_dry_run_of_the_own_stages(tmp_path):
    names = ["ceilings", "head_tests", "step_tests", "profile"]
    ended = dry_run(tmp_path, "--stages", *names)
    assert ended.returncode == 0, ended.stdout
    assert_whole(tmp_path, names)
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["tokens"] > 0
    assert profile["case"]["checkpointing"] is True
    assert profile["liger_layers"] == []
    for name in ("head_tests", "step_tests"):
        counts = json.loads((tmp_path / f"{name}.json").read_text())["counts"]
        # Without a GPU they are skipped, but their names are those that the stages ask for.
        assert counts["skipped"] >= 20, name
        assert set(counts) == {"skipped"}, name


@pytest.mark.torture
def test_a_whole_dry_run(tmp_path):
    ended = dry_run(tmp_path)
    assert ended.returncode == 0, ended.stdout
    stages = [s for part in PARTS for s in stages_of(part, "0.5b", is_quick=True, dry_run=True)]
    assert_whole(tmp_path, [stage.name for stage in stages])
    for part in PARTS:
        summary = json.loads((tmp_path / f"{part}.json").read_text())
        assert {each["status"] for each in summary["stages"].values()} == {"done"}
