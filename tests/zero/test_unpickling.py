from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dpofast.errors import CheckpointError
from dpofast.zero.unpickling import deepspeed_classes, reading_checkpoint
from tests.payloads import FORMATS, Honest, Payload, plant

FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with all that DeepSpeed's checkpoints hold."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    content = {
        "weights": torch.arange(3.0),
        "loss_scaler": LossScaler(scale=2.0),
        "dynamic": DynamicLossScaler(8.0, 7, 1.0, 1, False),
        "zero_stage": ZeroStageEnum.weights,
        "slices": {"a": fragment_address(numel=3, start=1)},
    }
    folder = tmp_path / "global_step2"
    folder.mkdir()
    torch.save(content, folder / "states.pt")
    return folder / "states.pt"


def read(file: Path, trust: bool = False, is_deepspeed: bool = True) -> dict:
    """Read as DeepSpeed does."""
    with reading_checkpoint(str(file.parents[1]), trust, is_deepspeed):
        return torch.load(file, weights_only=False)


def test_reads_what_deepspeed_writes(file: Path) -> None:
    content, plain = read(file), torch.load(file, weights_only=False)
    assert torch.equal(content["weights"], plain["weights"])
    for name in ("loss_scaler", "dynamic"):
        assert type(content[name]) is type(plain[name])
        assert vars(content[name]) == vars(plain[name])
    assert content["zero_stage"] is plain["zero_stage"]
    assert content["slices"] == plain["slices"]


@pytest.mark.parametrize("function", [os.mkdir, exec, os.system])
@pytest.mark.parametrize("trust", [False, True])
def test_a_planted_function_runs_only_if_trusted(file: Path, function: object, trust: bool) -> None:
    marker = file.parent / "marker"
    item = Payload(marker, function)  # type: ignore[arg-type]
    if function is os.system:
        item.marker = f"mkdir {marker}"
    plant(file, item)
    assert not marker.exists()
    if trust:
        read(file, trust=True)
    else:
        with pytest.raises(CheckpointError) as caught:
            read(file)
        message = str(caught.value)
        name = {os.mkdir: "posix.mkdir", exec: "exec", os.system: "posix.system"}[function]
        assert str(file) in message
        assert f" {name}," in message
        assert "trust_checkpoint: true" in message
    assert marker.exists() is trust


@pytest.mark.parametrize("form", FORMATS)
def test_no_format_runs_code(file: Path, form: str) -> None:
    marker = file.parent / "marker"
    FORMATS[form](file, Payload(marker))
    with pytest.raises(CheckpointError, match=r"states\.pt holds .* trust_checkpoint: true"):
        read(file)
    assert not marker.exists()


def test_a_torchscript_archive_is_refused(file: Path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(file)
    with pytest.raises(CheckpointError, match=r"states\.pt holds a pickle"):
        read(file)


def test_allowed_classes_call_nothing_that_a_file_names(file: Path) -> None:
    """State that a file gives them becomes attributes, and a function in it is refused itself."""
    scaler = torch.load(file, weights_only=False)["loss_scaler"]
    scaler.update_scale = Payload(file.parent / "marker")
    torch.save({"loss_scaler": scaler}, file)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        read(file)
    assert not (file.parent / "marker").exists()
    for kind in deepspeed_classes():
        assert "__reduce__" not in vars(kind)
        assert "__setstate__" not in vars(kind)


def test_an_unknown_class_needs_trust_or_the_script(file: Path) -> None:
    plant(file, Honest())
    with pytest.raises(CheckpointError, match=r"tests\.payloads\.Honest.* trust_checkpoint: true"):
        read(file)
    assert isinstance(read(file, trust=True)["planted"], Honest)
    with pytest.raises(CheckpointError, match=r"add_safe_globals"):
        read(file, is_deepspeed=False)
    with torch.serialization.safe_globals([Honest]):
        assert isinstance(read(file)["planted"], Honest)


def test_trust_is_only_for_what_deepspeed_reads(file: Path) -> None:
    plant(file, Honest())
    file = file.replace(file.parents[1] / "scheduler.pt")  # transformers reads this one
    for trust in (False, True):
        with (
            pytest.raises(CheckpointError, match=r"scheduler\.pt holds .*add_safe_globals"),
            reading_checkpoint(str(file.parent), trust, is_deepspeed=True),
        ):
            torch.load(file, weights_only=True)


def test_leaves_pytorch_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORCE, raising=False)
    monkeypatch.setenv(FORCE_NOT, "1")
    kept = deepspeed_classes()[0]
    with torch.serialization.safe_globals([kept]):
        before = set(torch.serialization.get_safe_globals())
        plant(file, Payload(file.parent / "marker"))
        with pytest.raises(CheckpointError):
            read(file)
        assert set(torch.serialization.get_safe_globals()) == before
    assert (os.environ.get(FORCE), os.environ[FORCE_NOT]) == (None, "1")
    assert not (file.parent / "marker").exists()


@pytest.mark.parametrize("tag", ["../other", "/etc", "..", "a/b", "", "a\\b"])
@pytest.mark.parametrize("name", ["latest", "latest_universal"])
def test_the_folder_of_the_states_is_one_of_the_checkpoint(file: Path, tag: str, name: str) -> None:
    (file.parents[1] / name).write_text("global_step2\n")
    read(file)
    (file.parents[1] / name).write_text(tag)
    with pytest.raises(CheckpointError, match=r"isn't a folder of this checkpoint"):
        read(file)


def test_a_damaged_or_missing_file_is_named(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"states\.pt can't be read \(.*another checkpoint"):
        read(file)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"states\.pt can't be read"):
        read(file)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"states\.pt is missing"):
        read(file)


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError), reading_checkpoint(str(tmp_path), False, False):
        raise KeyError("x")
