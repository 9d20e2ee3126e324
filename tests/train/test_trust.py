from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from dpofast.errors import CheckpointError
from dpofast.train.checkpoint.manifest import Manifest
from tests.payloads import Payload, plant, rewrite_manifest
from tests.support import make_trainer, token_pairs

pytestmark = pytest.mark.slow

OPTIONS = {"max_steps": 2}


def saved(folder: Path, **arguments: object) -> Path:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(folder, options=options, **arguments).train()
    return folder / "run" / "checkpoint-1"


def refused(folder: Path, checkpoint: Path, file: Path, **arguments: object) -> None:
    """Resume, and look at the error about a file that makes the folder `marker`."""
    rewrite_manifest(checkpoint)
    trainer = make_trainer(folder, options=OPTIONS, **arguments)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir.*add_safe_globals") as caught:
        trainer.train(str(checkpoint))
    assert str(caught.value).startswith(f"{file} holds ")
    assert not (folder / "marker").exists()


def test_no_file_that_transformers_reads_runs_code(tmp_path: Path) -> None:
    whole = saved(tmp_path)
    payload = Payload(tmp_path / "marker")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        checkpoint = tmp_path / name / whole.name
        shutil.copytree(whole, checkpoint)
        plant(checkpoint / name, payload)
        refused(tmp_path, checkpoint, checkpoint / name)
    # Weights as a pickle, in one file and in several.
    weights = load_file(whole / "model.safetensors")
    (whole / "model.safetensors").unlink()
    torch.save({**weights, "planted": payload}, whole / "pytorch_model.bin")
    refused(tmp_path, whole, whole / "pytorch_model.bin")
    shard = (whole / "pytorch_model.bin").rename(whole / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard.name)}
    (whole / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(tmp_path, whole, shard)


def test_files_that_nothing_needs_are_not_read(tmp_path: Path) -> None:
    whole = saved(tmp_path)
    names = ("training_args.bin", "pytorch_model.bin", "adapter_model.bin", "optimizer.bin")
    for name in names:
        torch.save({"planted": Payload(tmp_path / "marker")}, whole / name)
    (whole / "global_step1").mkdir()
    torch.save(Payload(tmp_path / "marker"), whole / "global_step1" / "mp_rank_00_model_states.pt")
    rewrite_manifest(whole)
    make_trainer(tmp_path, options=OPTIONS).train(str(whole))
    assert not (tmp_path / "marker").exists()


def test_no_adapter_runs_code(tmp_path: Path) -> None:
    adapter = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
    whole = saved(tmp_path, **adapter)
    (whole / "adapter_model.safetensors").unlink()
    torch.save({"planted": Payload(tmp_path / "marker")}, whole / "adapter_model.bin")
    refused(tmp_path, whole, whole / "adapter_model.bin", **adapter)


def test_the_best_model_runs_no_code(tmp_path: Path) -> None:
    """A planted trainer_state.json can name any folder as that of the best model."""
    best = {
        "max_steps": 2,
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 1,
        "eval_steps": 1,
    }
    make_trainer(tmp_path, options=best, eval_dataset=token_pairs(2)).train()
    whole = tmp_path / "run" / "checkpoint-1"
    other = tmp_path / "other"
    other.mkdir()
    torch.save({"planted": Payload(tmp_path / "marker")}, other / "pytorch_model.bin")
    state = json.loads((whole / "trainer_state.json").read_text())
    state |= {"best_metric": -1e9, "best_global_step": None}
    state["best_model_checkpoint"] = str(other)
    (whole / "trainer_state.json").write_text(json.dumps(state))
    rewrite_manifest(whole)
    unchecked = {**best, "verify_checkpoint": False}
    trainer = make_trainer(tmp_path, options=unchecked, eval_dataset=token_pairs(2))
    with pytest.raises(CheckpointError, match=r"other/pytorch_model\.bin holds"):
        trainer.train(str(whole))
    assert not (tmp_path / "marker").exists()


def test_a_manifest_names_no_file_outside_of_its_checkpoint(tmp_path: Path) -> None:
    whole = saved(tmp_path)
    manifest = Manifest.read(whole)
    record = manifest.files["optimizer.pt"]
    for name in ("../../optimizer.pt", "/etc/passwd", "a/../../b"):
        replace(manifest, files={**manifest.files, name: record}).write(whole)
        with pytest.raises(CheckpointError, match="names a file outside of the checkpoint"):
            make_trainer(tmp_path, options=OPTIONS).train(str(whole))
