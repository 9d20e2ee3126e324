"""The README's figures are exactly those of the committed results."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import report
from benchmarks.report import BEGIN, END, ResultError, main, read_figures

RESULT = {
    "benchmark": "train",
    "device": "cpu",
    "dry_run": False,
    "ratios": {
        "padded_speed": 2.0,
        "naive_speed": 5.25,
        "naive_memory": 0.125,
        "trl_speed": None,
        "trl_memory": None,
    },
    "case": {
        "model": ["llama", {"num_hidden_layers": 4, "hidden_size": 256}],
        "layers": None,
        "dtype": "float32",
        "data": "pairs",
    },
    "stamps": {
        "date": "2026-01-02T03:04:05+00:00",
        "command": "python -m benchmarks.train --device cpu --json runs/x.json",
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "hardware": {"devices": ["cpu"], "threads": 2, "cpu": "Some CPU"},
        "versions": {"torch": "2.13.0", "trl": "1.16.0"},
    },
}
OF_HEAD = {
    "benchmark": "head",
    "ratios": {"naive_time": 0.8, "naive_memory": 0.125, "floor_time": 1.1},
    "cases": [{"name": "one"}, {"name": "two"}],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    return tmp_path


def put(folder, result, name="result.json"):
    (folder / "results" / "cpu" / name).write_text(json.dumps(result))


def run(folder, *more):
    paths = ["--results", str(folder / "results"), "--readme", str(folder / "README.md")]
    return main([*paths, *more])


def changed(**changes):
    result = copy.deepcopy(RESULT)
    for name, value in changes.items():
        if value is None:
            del result[name]
        else:
            result[name] = value
    return result


def test_the_readme_is_in_step_with_the_results():
    assert main(["--check"]) == 0


def test_figures_of_a_race_of_steps(folder):
    put(folder, RESULT)
    assert run(folder) == 0
    text = (folder / "README.md").read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "On 2 cores of Some CPU (PyTorch 2.13.0, TRL 1.16.0):" in text
    assert "llama of 4 layers x 256, float32, on pairs" in text
    assert "| plain PyTorch | 5.25 | 0.12 |" in text
    assert "| TRL |" not in text  # no ratio
    assert "padded" not in text  # a variant of ours
    assert "(`python -m benchmarks.train --device cpu` at 0123456, 2026-01-02)" in text


def test_figures_of_a_race_with_several_answers(folder):
    case = {**RESULT["case"], "answers": 4}
    put(folder, changed(case=case, ratios={"ungrouped_speed": 3.0, "trl_speed": 9.0}))
    run(folder)
    text = (folder / "README.md").read_text()
    assert "float32, on pairs, 4 answers to a prompt and all their pairs**" in text
    assert "| dpofast without groups: each pair for itself | 3.00 | - |" in text


def test_times_are_turned_into_speeds(folder):
    put(folder, changed(**OF_HEAD))
    assert run(folder) == 0
    text = (folder / "README.md").read_text()
    assert "| plain PyTorch | 1.25 | 0.12 |" in text
    assert "forward and backward: one; two" in text
    assert "floor" not in text


def test_each_machine_has_a_table(folder):
    put(folder, RESULT, "a.json")
    other = changed(device="cuda")
    other["stamps"]["hardware"] = {"devices": ["Some GPU"]}
    put(folder, other, "b.json")
    put(folder, changed(**OF_HEAD), "c.json")
    run(folder)
    text = (folder / "README.md").read_text()
    assert text.count("| dpofast against |") == 2
    assert text.count("On Some GPU (PyTorch 2.13.0, TRL 1.16.0):") == 1
    tables = text.split("On ")[1:]
    assert [table.count("**") // 2 for table in tables] == [2, 1]


def test_check_writes_nothing_and_tells(folder, capsys):
    put(folder, RESULT)
    before = (folder / "README.md").read_text()
    assert run(folder, "--check") == 1
    assert "is out of step with" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == before
    run(folder)
    assert run(folder, "--check") == 0


def test_without_results(folder):
    assert run(folder) == 0
    assert "Nothing has been measured yet." in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (changed(dry_run=True), "result.json is of a dry run"),
        (changed(stamps=None), r"result.json can't be read .*KeyError\('stamps'\)"),
        (changed(case=["no"]), "result.json can't be read"),
        ([], "result.json can't be read"),
    ],
)
def test_what_is_no_result_is_named(folder, result, message, capsys):
    put(folder, result)
    with pytest.raises(ResultError, match=message):
        read_figures(folder / "results" / "cpu" / "result.json")
    assert run(folder) == 2
    assert "result.json" in capsys.readouterr().err


@pytest.mark.parametrize("git", [{"commit": "01", "dirty": True}, {"commit": None, "dirty": None}])
def test_a_changed_checkout_is_refused(folder, git):
    result = changed()
    result["stamps"]["git"] = git
    put(folder, result)
    with pytest.raises(ResultError, match="checkout with changes"):
        read_figures(folder / "results" / "cpu" / "result.json")


def test_a_file_that_is_not_json(folder, capsys):
    (folder / "results" / "cpu" / "cut.json").write_text('{"benchmark": ')
    assert run(folder) == 2
    assert "cut.json can't be read as a benchmark's result" in capsys.readouterr().err


def test_a_readme_without_its_markers(folder, capsys):
    (folder / "README.md").write_text("nothing here")
    assert run(folder) == 2
    assert "lacks the lines" in capsys.readouterr().err


def test_every_rival_is_a_contender():
    from benchmarks import head_contenders, reference_contenders, train_contenders

    known = {
        *head_contenders.ENTRIES,
        *train_contenders.ENTRIES,
        *reference_contenders.ENTRIES,
    }
    assert set(report.RIVALS) <= known
