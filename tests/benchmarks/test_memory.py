"""The processes that measure memory: many cases in one, and reports of one that is stopped."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from benchmarks import head_contenders
from benchmarks.head import BENCHMARK
from benchmarks.head_cases import Case, make_inputs
from benchmarks.head_contenders import ENTRIES
from benchmarks.memory import measure_in_child

MANY = 10  # torch.compile gives up on a function after 8 sizes


@pytest.mark.slow
def test_each_of_many_cases_is_compiled(monkeypatch, tmp_path, capsys):
    def make(inputs):
        options = {"backend": "eager", "fullgraph": True, "dynamic": False}
        compiled = torch.compile(head_contenders.naive_logps, **options)
        return head_contenders.work_of_logps(compiled, inputs)

    monkeypatch.setitem(ENTRIES, "compile", replace(ENTRIES["compile"], make=make))
    cases = [Case("tiny", 4 + number, 8, 11, 1, "float32", even=False) for number in range(MANY)]
    with_targets = []
    for case in cases:
        inputs = make_inputs(case, "cpu")
        targets = {"labels": inputs.labels, "ref_logps": inputs.ref_logps}
        with_targets.append((case, targets))
    file = tmp_path / "cases.pt"
    torch.save(with_targets, file)
    BENCHMARK.child(Namespace(threads=1, child_file=file, device="cpu", memory_of="compile"))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == MANY
    assert [each.get("reason") for each in found] == [None] * MANY


@pytest.mark.slow
def test_what_a_child_had_measured_before_its_time_was_up_is_kept(tmp_path, monkeypatch):
    program = "import time\nprint('{\"peak\": 3}', flush=True)\ntime.sleep(30)\n"
    (tmp_path / "a_slow_one.py").write_text(program)
    monkeypatch.syspath_prepend(str(tmp_path))
    found, reason = measure_in_child("a_slow_one", [], 2.0)
    assert (found, reason) == ([{"peak": 3}], "took longer than 2 s")
