"""`dpofast ref build | info | verify | prune | export`: commands of the reference store."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpofast.cli.device_memory import read_device_options
from dpofast.cli.given import COMMAND_LINE, split_own_options
from dpofast.cli.option_types import checked_value
from dpofast.cli.process_start import is_main_process
from dpofast.cli.run_options import RunOptions, read_options
from dpofast.columns import REF_COLUMNS
from dpofast.errors import ConfigError, ReferenceStoreError


def reference(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Run the command that the parser found."""
    match parsed.action:
        case "build":
            _build(parsed.config, overrides)
        case "export":
            _export(parsed.config, overrides)
        case "info":
            _info(_folder(parsed.folder))
        case "prune":
            _prune(_folder(parsed.folder), parsed.forget)
        case _:
            _verify(_folder(parsed.folder))


def _build(yaml_file: str | None, overrides: list[str]) -> None:
    """Score the answers of the training and held-out pairs that are missing from the store."""
    from dpofast.cli.train import make_trainer
    from dpofast.train.reports.summary import reference_summary

    options = read_device_options(yaml_file, overrides)
    options.require("model_name_or_path", "dataset_name")
    _refuse_unkept(options, "the build would keep nothing; leave it out")
    trainer = make_trainer(options)
    trainer.score_datasets(rescore=True)
    if trainer.train_set().plan is None:
        trainer.loaders.begin(trainer.train_set())  # logs how training will pack the pairs
    if is_main_process():
        done = reference_summary(trainer.reference)
        print(
            f"{done['ref_rows_needed']} answers: {done['ref_store_hits']} found, "
            f"{done['ref_rows_scored']} scored in {done['ref_forward_passes']} forward passes; "
            f"store: {done['reference_store']}"
        )


def _export(yaml_file: str | None, overrides: list[str]) -> None:
    """Write the training pairs and their stored log-probs to a file; nothing is scored."""
    from dpofast.cli.train import make_trainer
    from dpofast.export import Source, check_output, export_pairs
    from dpofast.options.named_loss import is_unpaired

    own, others = split_own_options(overrides, ("output",))
    options = read_options(yaml_file, others, ("output",))
    options.require("model_name_or_path", "dataset_name")
    script = options.script
    if len(script.dataset_names) > 1:
        without = "" if script.dataset_weights is None else " --dataset_weights null"
        raise ConfigError(
            f"{options.source}: dataset_name names {len(script.dataset_names)} datasets, whose "
            "rows can have different columns; export one at a time, as `--dataset_name "
            f"{script.dataset_names[0]} --dataset_shares null{without}`."
        )
    (dataset_name,) = script.dataset_names
    if script.dataset_streaming:
        raise ConfigError(
            f"{options.source}: dataset_streaming can't be exported, as the file holds all pairs; "
            "set it to false."
        )
    if "output" not in own:
        raise ConfigError(
            f"{COMMAND_LINE}: --output is missing; name the file to write, as `--output "
            "pairs.parquet`."
        )
    output = check_output(
        checked_value("--output", own["output"].value, str, COMMAND_LINE), dataset_name
    )
    if is_unpaired(options.config):
        raise ConfigError(
            f"{options.source}: the export holds pairs, and {options.config.loss_type[0]} has "
            "none; set loss_type to a loss of pairs, whose log-probs are the same."
        )
    _refuse_unkept(options, "there is nothing to export; leave it out, and run `dpofast ref build`")
    trainer = make_trainer(options)
    identity = trainer.reference.settle()
    if is_main_process():
        source = Source(
            dataset_name,
            columns=script.dataset_columns,
            split=script.dataset_train_split,
            roles=script.dataset_roles,
            config_name=script.dataset_config,
            skip_bad_rows=options.config.skip_bad_rows,
        )
        train_set = trainer.train_set()
        report = train_set.report
        namespace = trainer.reference.store.namespace
        count = export_pairs(output, source, train_set.pairs, report, namespace)
        print(
            f"{count} of {report.pairs_read} pairs written to {output}, with the log-probs of "
            f"reference {identity.digest[:12]} in {' and '.join(REF_COLUMNS)}"
        )


def _refuse_unkept(options: RunOptions, consequence: str) -> None:
    """Raise ConfigError if the options don't keep log-probs: the command would have no effect."""
    if options.config.make_loss().is_reference_free:
        raise ConfigError(
            f"{options.source}: the loss {' + '.join(options.config.loss_type)} has no reference, "
            "so there are no log-probs to keep; choose a loss_type that has one."
        )
    if not options.config.precompute_ref_log_probs:
        raise ConfigError(
            f"{options.source}: precompute_ref_log_probs is false, so no log-probs are kept, and "
            f"{consequence}."
        )


def _info(folder: Path) -> None:
    from dpofast.reference.store.info import describe

    print("\n".join(describe(folder)))


def _verify(folder: Path) -> None:
    from dpofast.reference.store.verify import verify

    report = verify(folder)
    print("\n".join(report.lines()))
    if not report.ok:
        raise ReferenceStoreError(f"{folder} is damaged; what to do stands above.")


def _prune(folder: Path, forget: list[str]) -> None:
    from dpofast.reference.store.prune import prune

    print("\n".join(prune(folder, forget).lines()))


def _folder(given: str | None) -> Path:
    """The store's folder, by default the one that training uses."""
    if given is not None:
        return Path(given).expanduser()
    from dpofast.reference.store.location import default_folder

    return default_folder()
