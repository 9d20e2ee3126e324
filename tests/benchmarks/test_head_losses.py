"""The race of the losses: its results are judged, and its ratios written."""

from __future__ import annotations

import json

import pytest

from benchmarks.head import cases_of, parse
from benchmarks.head_losses import NAMES, loss_of, race_losses
from dpofast_kernels import LOSSES, UNPAIRED_LOSSES, make_loss


def options(tmp_path, *words):
    return parse(["--dry-run", "--losses", *words, "--json", str(tmp_path / "losses.json")])


def test_each_loss_is_timed_beside_sigmoid(tmp_path, capsys):
    given = options(tmp_path, "mixture", "apo_zero", "kto")
    assert race_losses(cases_of(given), given) == 0
    report = json.loads((tmp_path / "losses.json").read_text())
    (case,) = report["cases"]
    assert list(case["losses"]) == ["sigmoid", "mixture", "apo_zero", "kto"]
    printed = capsys.readouterr().out
    for name, found in case["losses"].items():
        assert len(found["seconds"]) == 2
        assert found["over_sigmoid"] == found["median"] / case["losses"]["sigmoid"]["median"]
        assert name in printed
    assert report["stamps"]["hardware"]


def test_a_wrong_loss_is_not_timed(tmp_path, monkeypatch, capsys):
    class Wrong(type(make_loss("ipo"))):
        def pair_loss(self, *args):
            self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
            loss, *slopes = super().pair_loss(*args)
            return loss * self.calls, *slopes

    wrong = Wrong()
    monkeypatch.setattr("benchmarks.head_losses.make_loss", lambda *_: wrong)
    given = options(tmp_path, "ipo")
    assert race_losses(cases_of(given), given) == 1
    assert "wrong: its loss isn't that of its log-probs" in capsys.readouterr().out


def test_all_losses_take_part():
    assert {*LOSSES, *UNPAIRED_LOSSES} < set(NAMES)
    for name in NAMES:
        assert name in ("mixture", "divergence") or loss_of(name).name == name


@pytest.mark.parametrize("mode", ["--losses", "--statistics"])
def test_a_cpu_races_them_on_a_small_head_unless_told_otherwise(mode):
    def sizes(*words):
        cases = cases_of(parse(["--device", "cpu", mode, "all", *words]))
        return [(case.num_tokens, case.hidden_size, case.vocab_size) for case in cases]

    assert sizes() == [(512, 512, 32768)]
    assert sizes("--vocab", "1000", "--tokens", "64", "128") == [(64, 512, 1000), (128, 512, 1000)]
    assert sizes("--shapes", "mistral-7b") == [(1024, 4096, 32768)]


def test_an_unknown_loss_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        options(tmp_path, "hing")
    assert "invalid choice: 'hing'" in capsys.readouterr().err
