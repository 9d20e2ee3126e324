"""Nothing that only reports ends a run: each reporter is made to fail, and the model is saved."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, PrinterCallback

from dpofast.data.packing.collate import Layout
from dpofast.monitor.callbacks import METRICS_FILE
from dpofast.monitor.plots import PLOT_FILE
from dpofast.monitor.summary import SUMMARY_FILE
from tests.families import tiny_model
from tests.support import history, make_trainer, token_pairs

PEAK = "dpofast.monitor.throughput.peak_flops"
REPORTERS = {
    "dpofast.monitor.throughput.TrainingFlops": "mfu: counting the operations",
    "dpofast.model.flops.TrainingFlops.of": "mfu: counting the operations",
    "dpofast.train.reports.reports_run.plot_run": PLOT_FILE,
    "dpofast.train.reports.reports_run.write_summary": SUMMARY_FILE,
    "dpofast.train.reports.summary.write_json": SUMMARY_FILE,
    "dpofast.train.reports.summary.reference_summary": "its part 'reference'",
    "dpofast.train.reports.summary.packing_summary": "its part 'packing'",
    "dpofast.train.reports.summary.environment": "its part 'environment'",
    "dpofast.monitor.summary.peak_memory_bytes": "its part 'environment'",
}


def broken(*args, **kwargs):
    raise RuntimeError("this report is broken")


def saved_after_training(trainer, folder):
    trainer.train()
    trainer.save_model(str(folder))
    again = AutoModelForCausalLM.from_pretrained(folder)
    pairs = zip(trainer.model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(own, other) for own, other in pairs)


def guarded(caplog):
    logs = [record for record in caplog.records if record.name == "dpofast.monitor.guard"]
    return [record.getMessage() for record in logs]


@pytest.mark.parametrize("name", REPORTERS)
@pytest.mark.slow
def test_a_broken_reporter_is_one_warning(tmp_path, monkeypatch, caplog, name):
    monkeypatch.setattr(PEAK, lambda *_: 1e12)  # so that operations are counted
    expected = history_of_two_steps(tmp_path / "plain")
    caplog.clear()
    monkeypatch.setattr(name, broken)
    trainer = make_trainer(tmp_path, options={"max_steps": 2})
    saved_after_training(trainer, tmp_path / "saved")
    assert history(trainer) == expected
    (line,) = guarded(caplog)
    assert REPORTERS[name] in line
    assert "RuntimeError: this report is broken" in line
    if "its part" in line:
        part = REPORTERS[name].split("'")[1]
        summary = json.loads((tmp_path / "run" / SUMMARY_FILE).read_text())
        assert summary["global_step"] == 2
        found = {"reference": "ref_rows_needed", "packing": "packing", "environment": "versions"}
        assert [key for key, fact in found.items() if fact not in summary] == [part]


def history_of_two_steps(folder):
    trainer = make_trainer(folder, options={"max_steps": 2})
    trainer.train()
    return history(trainer)


def test_a_reporter_of_transformers_that_fails_while_it_logs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(PrinterCallback, "on_log", broken)
    trainer = make_trainer(tmp_path, options={"max_steps": 2})
    saved_after_training(trainer, tmp_path / "saved")
    assert guarded(caplog)[0].startswith("PrinterCallback failed (RuntimeError: this report is")


def test_files_that_cannot_be_written(tmp_path, caplog):
    for name in (METRICS_FILE, SUMMARY_FILE):
        (tmp_path / "run" / name / "a folder").mkdir(parents=True)
    trainer = make_trainer(tmp_path, options={"max_steps": 2})
    saved_after_training(trainer, tmp_path / "saved")
    first, second = guarded(caplog)
    assert first.startswith(f"{METRICS_FILE} failed (IsADirectoryError: ")
    assert second.startswith(f"{SUMMARY_FILE} failed (IsADirectoryError: ")


@pytest.mark.parametrize("family", ["gemma4", "gemma4 with experts", "gemma3n"])
def test_layers_of_different_sizes_train_with_a_count(tmp_path, monkeypatch, caplog, family):
    monkeypatch.setattr(PEAK, lambda *_: 1e12)
    pairs = token_pairs(6).map(lambda row: {key: [i % 97 for i in row[key]] for key in row})
    trainer = make_trainer(tmp_path, tiny_model(family), pairs, options={"max_steps": 2})
    assert trainer.layout == Layout("shared", 0)
    saved_after_training(trainer, tmp_path / "saved")
    assert history(trainer)[0][0] == pytest.approx(0.6931472, abs=1e-5)
    assert all("mfu" in log for log in trainer.state.log_history if "grad_norm" in log)
    assert guarded(caplog) == []


def test_a_family_without_a_count_logs_why_there_is_no_figure(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(PEAK, lambda *_: 1e12)
    pairs = token_pairs(6).map(lambda row: {key: [i % 97 for i in row[key]] for key in row})
    trainer = make_trainer(tmp_path, tiny_model("mamba"), pairs, options={"max_steps": 1})
    saved_after_training(trainer, tmp_path / "saved")
    assert not any("mfu" in log for log in trainer.state.log_history)
    (line,) = guarded(caplog)
    assert "layers of type linear_attention aren't known" in line
