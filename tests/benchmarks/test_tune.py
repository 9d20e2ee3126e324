"""The tuner runs the kernel it times, rejects wrong candidates, and keeps the fastest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from benchmarks import REPOSITORY
from benchmarks import tune as tuner
from benchmarks.head_cases import MODELS, make_inputs
from dpofast_kernels.head import finish_triton, fused_triton, launch, pairs_triton, rows_triton

MODULES = {
    "score_rows": rows_triton,
    "score_tiles": fused_triton,
    "score_tiles_wide": fused_triton,
    "finish_rows": finish_triton,
    "target_products": fused_triton,
    "pair_loss": pairs_triton,
}
# A configuration of each kernel that no other entry of the table has.
OWN = {
    "score_rows": {"BV": 1024},
    "score_tiles": {"BM": 16},
    "score_tiles_wide": {"BM": 16},
    "finish_rows": {"BT": 4},
    "target_products": {"BH": 128},
    "pair_loss": {"BN": 16},
}
CANDIDATES = [{"BN": 1}, {"BN": 2}, {"BN": 3}, {"BN": 4}]


class Launches:
    """A kernel that records the options of its launches."""

    def __init__(self, kernel):
        self.kernel, self.options = kernel, []

    def __getitem__(self, grid):
        launched = self.kernel[grid]

        def run(*arguments, **options):
            self.options.append(options)
            return launched(*arguments, **options)

        return run


@pytest.fixture
def entry(monkeypatch):
    """A copy of the CPU's entry in the table, for the test to change."""
    entry = deepcopy(launch.launch_table()["cpu"])
    monkeypatch.setitem(launch.launch_table(), "cpu", entry)
    return entry


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(tuner.case_for("score_rows", tuner.parse(["--dry-run"])), "cpu")


@pytest.mark.skipif(
    not launch.is_interpreted(rows_triton.score_rows_kernel), reason="needs interpreted kernels"
)
@pytest.mark.parametrize("kernel", tuner.WORK)
@pytest.mark.slow
def test_each_work_launches_its_kernel_as_the_entry_says(kernel, entry, inputs, monkeypatch):
    name = f"{kernel.removesuffix('_wide')}_kernel"
    launches = Launches(getattr(MODULES[kernel], name))
    monkeypatch.setattr(MODULES[kernel], name, launches)
    entry[kernel] = {**entry[kernel], **OWN[kernel]}
    tuner.work(kernel, inputs)()
    assert launches.options
    for options in launches.options:
        assert OWN[kernel].items() <= options.items()
        assert options.get("KEEP", True)  # the variant that also computes gradients


def test_every_kernel_of_the_table_can_be_tuned():
    for entry in launch.launch_table().values():
        assert set(entry) - {"measured"} == set(tuner.WORK) == set(tuner.CHOICES)
    for kernel, choices in tuner.CHOICES.items():
        assert set(choices) <= set(launch.launch_table()["sm_90"][kernel])


def test_small_cases_are_for_kernels_that_do_not_read_the_vocabulary():
    given = tuner.parse(["--model", "gemma-2-2b", "--tokens", "8192"])
    sizes = {kernel: tuner.case_for(kernel, given) for kernel in tuner.WORK}
    assert {kernel for kernel, case in sizes.items() if case.vocab_size == tuner.SMALL_VOCAB} == {
        "pair_loss",
        "target_products",
    }
    assert {case.hidden_size for case in sizes.values()} == {MODELS["gemma-2-2b"][0]}
    assert {(case.num_tokens, case.num_pairs) for case in sizes.values()} == {(8192, 16)}


@pytest.mark.parametrize("kernel", tuner.WORK)
def test_candidates_start_with_the_present_one_and_come_once(kernel):
    current = launch.launch_table()["sm_90"][kernel]
    found = list(tuner.candidates(kernel, current))
    assert found[0] == current
    assert len(found) > 3
    assert len({json.dumps(each, sort_keys=True) for each in found}) == len(found)
    assert all(each.keys() == current.keys() for each in found)
    for each in found[1:]:
        assert each.get("BM", 0) * each.get("BN", 0) <= 4096 * each["num_warps"]


@pytest.fixture
def race(monkeypatch, inputs):
    """Tune four configurations of pair_loss, with given answers and seconds for each BN."""

    def run(gives, seconds):
        entry = {"pair_loss": CANDIDATES[0]}
        right = tuner.work("pair_loss", inputs, "torch")()

        def fake_work(kernel, _, backend=None):
            if backend == "torch":
                return lambda: right
            return lambda: gives.get(entry[kernel]["BN"], lambda given: given)(right)

        monkeypatch.setattr(tuner, "candidates", lambda *_: iter(CANDIDATES))
        monkeypatch.setattr(tuner, "work", fake_work)
        timed = tuner.tune(
            "pair_loss", entry, inputs, lambda _: seconds[entry["pair_loss"]["BN"]], None
        )
        return timed, entry["pair_loss"]["BN"]

    return run


def raise_error(_):
    raise RuntimeError("out of resource: shared memory\nand a long trace")


def test_the_fastest_is_kept(race):
    assert race({}, {1: 3.0, 2: 2.0, 3: 1.0, 4: 2.5}) == (True, 3)


@pytest.mark.parametrize("part", ["logps", "d_hidden_states", "d_weight"])
@pytest.mark.parametrize("factor", [1.02, float("nan")])
def test_a_wrong_candidate_is_left_out(part, factor, race, capsys):
    def wrong(right):
        return replace(right, **{part: getattr(right, part) * factor})

    assert race({3: wrong}, {1: 3.0, 2: 2.0, 3: 1.0, 4: 2.5}) == (True, 2)
    assert 'pair_loss {"BN": 3}: left out, ' in capsys.readouterr().out


def test_one_that_does_not_launch_is_left_out_the_present_one_too(race, capsys):
    gives = {1: raise_error, 3: raise_error}
    assert race(gives, {1: 0.5, 2: 2.0, 3: 1.0, 4: 2.5}) == (True, 2)
    reason = "left out, RuntimeError: out of resource: shared memory\n"
    assert capsys.readouterr().out.count(reason) == 2


def test_where_none_can_be_timed_the_present_one_stays(race):
    assert race(dict.fromkeys([1, 2, 3, 4], raise_error), {}) == (False, 1)


def test_the_text_is_that_of_the_committed_table():
    committed = launch.TABLE_FILE.read_text()
    assert tuner.as_text(json.loads(committed)) == committed


def test_what_was_measured_survives_as_text():
    table = deepcopy(launch.launch_table())
    table["sm_90"]["measured"] = {"pair_loss": {"device": "a GPU", "versions": {"triton": "3.6"}}}
    assert json.loads(tuner.as_text(table)) == table


def test_an_architecture_of_its_own_gets_a_copy():
    table = deepcopy(launch.launch_table())
    table["sm_90"]["measured"] = {"pair_loss": {"device": "a GPU"}}
    before = deepcopy(table)
    assert tuner.own_entry(table, "sm_90") is table["sm_90"]
    assert table == before
    own = tuner.own_entry(table, "sm_93")
    assert own == {**before["sm_90"], "measured": None}
    own["pair_loss"]["BN"] = 7
    assert table.pop("sm_93") is own
    assert table == before


def test_a_measured_table_is_written_kernel_by_kernel(monkeypatch, tmp_path, capsys):
    table, file = deepcopy(launch.launch_table()), tmp_path / "launch.json"
    earlier = {"pair_loss": {"device": "old"}, "score_rows": {"device": "old"}}
    table["sm_90"]["measured"] = earlier
    monkeypatch.setattr(tuner, "TABLE_FILE", file)
    monkeypatch.setattr(tuner, "launch_table", lambda: table)
    monkeypatch.setattr(tuner, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(tuner, "tune", lambda kernel, *_: kernel != "finish_rows")
    monkeypatch.setattr(tuner, "make_inputs", lambda case, _: case)
    monkeypatch.setattr(tuner, "clock_for", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    tuner.main(["--kernels", "pair_loss", "finish_rows", "--write"])
    written = json.loads(file.read_text())
    assert written == table
    measured = written["sm_90"]["measured"]
    assert measured.keys() == {"pair_loss", "score_rows"}
    assert measured["score_rows"] == {"device": "old"}
    assert measured["pair_loss"].keys() == {"device", "date", "case", "versions"}
    assert measured["pair_loss"]["case"].endswith("H=3584, V=1024")
    assert file.read_text() in capsys.readouterr().out


@pytest.mark.slow
def test_a_dry_run_needs_no_setting_and_writes_nothing():
    committed = launch.TABLE_FILE.read_text()
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    command = [sys.executable, "-m", "benchmarks.tune", "--dry-run", "--write"]
    ended = subprocess.run(
        [*command, "--kernels", "pair_loss", "--limit", "2"],
        cwd=REPOSITORY,
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(" ms\n") == 2
    table = json.loads(ended.stdout[ended.stdout.index("{\n") :])
    assert table["cpu"]["measured"] is None
    assert launch.TABLE_FILE.read_text() == committed


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no CUDA or ROCm device to measure on"):
        tuner.main([])
