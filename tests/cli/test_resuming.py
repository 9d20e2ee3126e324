"""`dpofast train` starts, resumes and exports, and keeps to folders of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpofast.cli import main
from dpofast.cli.report import report
from dpofast.errors import DifferentRunError
from tests.cli.runs import error_of, run_arguments


@pytest.mark.slow  # three runs
def test_one_command_starts_resumes_and_exports(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = run_arguments(
        tmp_path, model_folder, "--save_strategy=steps", "--resume_from_checkpoint=auto"
    )
    assert main(command) == 0
    run = tmp_path / "run"
    expected = (run / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "summary.json"):
        (run / name).unlink()
    for _ in range(2):
        capsys.readouterr()
        assert main(command) == 0
        assert "2 steps, all trained before this start" in capsys.readouterr().out
        assert (run / "model.safetensors").read_bytes() == expected


def test_folders_that_the_run_reads_from_are_refused_before_anything_is_loaded(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "link"
    link.symlink_to(model_folder)
    before = sorted(path.name for path in model_folder.iterdir())
    for output_dir, what in (
        (link, "is the folder of model_name_or_path"),
        (model_folder / "run", "is inside the folder of model_name_or_path"),
        (tmp_path / "reference" / "run", "is inside the folder of reference_store"),
    ):
        (tmp_path / "reference").mkdir(exist_ok=True)
        command = [
            *(w for w in run_arguments(tmp_path, model_folder) if "--output_dir" not in w),
            f"--output_dir={output_dir}",
        ]
        sentence = error_of(capsys, command)
        assert f"command line: output_dir: {str(output_dir)!r} {what}" in sentence
    assert sorted(path.name for path in model_folder.iterdir()) == before


def test_a_second_run_with_checkpoints_is_refused(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = run_arguments(tmp_path, model_folder)
    assert main(command) == 0
    expected = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert "holds checkpoint-2 of an earlier run" in error_of(capsys, command)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == expected


def test_differences_between_runs_are_printed_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    report(
        DifferentRunError("'run' differs:\n  beta: 0.1 in the checkpoint, 0.2 now\nSet it back.")
    )
    printed = capsys.readouterr().err.splitlines()
    assert printed[1].strip() == "beta: 0.1 in the checkpoint, 0.2 now"
    assert len(printed) == 3
