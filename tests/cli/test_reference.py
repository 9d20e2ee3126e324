"""`dpofast ref`, from its arguments to what it prints and leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dpofast.cli import main
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore
from tests.cli.runs import error_of, run_arguments


def test_ref_build_info_verify_prune(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder)[1:]
    store = tmp_path / "reference"
    assert main(["ref", "build", *arguments]) == 0
    assert "12 answers: 0 found, 12 scored" in capsys.readouterr().out
    assert main(["ref", "build", *arguments]) == 0
    assert "12 answers: 12 found, 0 scored in 0 forward passes" in capsys.readouterr().out
    assert main(["ref", "info", str(store)]) == 0
    assert "12 rows" in capsys.readouterr().out
    assert main(["ref", "verify", str(store)]) == 0
    assert main(["ref", "prune", str(store)]) == 0
    assert "references: 1 kept, 0 deleted" in capsys.readouterr().out
    assert "names 0 references" in error_of(
        capsys, ["ref", "prune", str(store), "--forget", "0123456789"]
    )
    segment = next(store.rglob("*.arrow"))
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    assert "is damaged" in error_of(capsys, ["ref", "verify", str(store)])


def details(folder: Path) -> list[int]:
    """How many rows of a store are stored with each detail or a greater one."""
    store = ReferenceStore.open(folder)
    (digest,) = store.digests()
    counts = store.namespace(store.identity(digest)).counts()
    return [counts.of_detail[detail] for detail in RowDetail]


def test_ref_build_asks_for_a_detail_and_a_run_takes_any(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder)[1:]
    store = tmp_path / "reference"

    def build(detail: str) -> str:
        assert main(["ref", "build", *arguments, f"--reference_store_detail={detail}"]) == 0
        return capsys.readouterr().out

    assert "0 found, 12 scored" in build("sums")
    assert details(store) == [12, 0, 0]
    assert main(["train", *arguments, "--reference_store_detail=logsumexps"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ref_rows_scored"] == 0
    assert "0 found, 12 scored" in build("logps")
    assert "12 found, 0 scored" in build("sums")
    assert details(store) == [12, 12, 0]
    assert "0 found, 12 scored" in build("logsumexps")
    assert details(store) == [12, 12, 12]
    assert "12 found, 0 scored" in build("logps")
    assert "expected one of sums, logps, logsumexps" in error_of(
        capsys, ["ref", "build", *arguments, "--reference_store_detail=all"]
    )


def test_ref_export_writes_what_trains_as_the_store_does(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder)[1:]
    output = tmp_path / "exported.parquet"
    exporting = ["ref", "export", *arguments, "--output", str(output)]
    sentence = error_of(capsys, exporting)
    assert "lacks 12 of 12 reference log-probs" in sentence
    assert "run `dpofast ref build` with the same options first" in sentence
    assert not output.exists()

    def losses() -> list[float]:
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return [log["loss"] for log in map(json.loads, lines) if "loss" in log]

    assert main(["train", *arguments]) == 0
    expected = losses()
    capsys.readouterr()
    assert main(exporting) == 0
    assert f"6 of 6 pairs written to {output}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "reference")
    shutil.rmtree(tmp_path / "run")
    arguments = [text for text in arguments if not text.startswith("--dataset_name=")]
    assert main(["train", *arguments, f"--dataset_name={output}"]) == 0
    assert losses() == expected
    assert len(expected) == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ref_rows_needed"] == 0


def test_ref_build_refuses_to_keep_nothing(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dpofast.cli.train.make_trainer", None)
    arguments = [*run_arguments(tmp_path, model_folder)[1:], "--precompute_ref_log_probs=false"]
    assert "the build would keep nothing" in error_of(capsys, ["ref", "build", *arguments])
    arguments = [*run_arguments(tmp_path, model_folder)[1:], "--loss_type=simpo"]
    assert "the loss simpo has no reference" in error_of(capsys, ["ref", "build", *arguments])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--output is missing; name the file to write, as `--output pairs.parquet`"),
        (["--output=pairs.txt"], "got 'pairs.txt', expected a name that ends in one of .parquet"),
        (["--output=pairs.json"], "pairs.json is the file that the pairs are read from"),
        (["--output=a.json", "--precompute_ref_log_probs=false"], "no log-probs are kept"),
        (["--output=1", "2"], "--output: got [1, 2], expected text"),
    ],
)
def test_ref_export_refuses_before_anything_is_loaded(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dpofast.cli.train.make_trainer", None)
    arguments = run_arguments(tmp_path, model_folder)[1:]
    assert message in error_of(capsys, ["ref", "export", *arguments, *more])
