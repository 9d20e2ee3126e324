"""The race of the statistics: log-probs are compared, and ratios written."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import head_statistics
from benchmarks.head import cases_of, parse
from dpofast_kernels import STATISTICS


def options(tmp_path, *words):
    return parse(["--dry-run", "--statistics", *words, "--json", str(tmp_path / "found.json")])


@pytest.mark.parametrize("asked", ["all", "entropy"])
def test_each_statistic_is_timed_beside_none(asked, tmp_path, capsys):
    given = options(tmp_path, asked)
    assert head_statistics.race_statistics(cases_of(given), given) == 0
    (case,) = json.loads((tmp_path / "found.json").read_text())["cases"]
    names = ["none", *STATISTICS, "all"] if asked == "all" else ["none", "entropy"]
    assert list(case["statistics"]) == names
    printed = capsys.readouterr().out
    for name, found in case["statistics"].items():
        assert found["over_none"] == found["median"] / case["statistics"]["none"]["median"]
        assert name in printed


def test_changed_log_probs_are_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        head_statistics, "scored", lambda inputs, statistics: torch.zeros(1) + len(statistics)
    )
    given = options(tmp_path, "is_top")
    assert head_statistics.race_statistics(cases_of(given), given) == 1
    assert "wrong: its log-probs differ from those without statistics" in capsys.readouterr().out


def test_an_unknown_statistic_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        options(tmp_path, "entropie")
    assert "invalid choice: 'entropie'" in capsys.readouterr().err
