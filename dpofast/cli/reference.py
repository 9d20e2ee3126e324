"""`dpofast ref build | info | verify | prune`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpofast.cli.options import read_options
from dpofast.cli.quiet import is_main_process
from dpofast.errors import ReferenceStoreError


def reference(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Run one of the store's commands."""
    match parsed.action:
        case "build":
            _build(parsed.config, overrides)
        case "info":
            _info(_folder(parsed.folder))
        case "prune":
            _prune(_folder(parsed.folder), parsed.forget)
        case _:
            _verify(_folder(parsed.folder))


def _build(yaml_file: str | None, overrides: list[str]) -> None:
    """Score the answers of the training and held-out pairs that the store lacks."""
    from dpofast.cli.train import make_trainer
    from dpofast.summary import reference_summary

    options = read_options(yaml_file, overrides)
    options.require("model_name_or_path", "dataset_name")
    trainer = make_trainer(options)
    trainer.reference.provider.rescore = True
    trainer.get_train_dataloader()
    if trainer.eval_dataset is not None:
        trainer.get_eval_dataloader()
    if is_main_process():
        done = reference_summary(trainer)
        print(
            f"{done['ref_rows_needed']} answers: {done['ref_store_hits']} found, "
            f"{done['ref_rows_scored']} scored in {done['ref_forward_passes']} forward passes; "
            f"store: {done['reference_store']}"
        )


def _info(folder: Path) -> None:
    from dpofast.reference.report import describe

    print("\n".join(describe(folder)))


def _verify(folder: Path) -> None:
    from dpofast.reference.report import verify

    report = verify(folder)
    print("\n".join(report.lines()))
    if not report.ok:
        raise ReferenceStoreError(f"{folder} is damaged; what to do stands above.")


def _prune(folder: Path, forget: list[str]) -> None:
    from dpofast.reference.prune import prune

    print("\n".join(prune(folder, forget).lines()))


def _folder(given: str | None) -> Path:
    """The store's folder; without one given, the default of DPOConfig.reference_store."""
    if given is not None:
        return Path(given).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "dpofast" / "reference"
