"""`dpofast eval`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dpofast.cli.device_memory import read_device_options
from dpofast.cli.inputs import (
    adapter_base,
    load_policy_model,
    load_reference_model,
    load_tokenizer_for,
    refuse_missing_model,
    trainer_class,
)
from dpofast.cli.process_start import is_main_process
from dpofast.cli.run_data import NO_HELD_OUT_PAIRS, load_held_out_data
from dpofast.cli.run_options import RunOptions
from dpofast.errors import ConfigError
from dpofast.options.output_dir import make_output_dir

EVALUATION_FILE = "evaluation.json"


def evaluate(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Measure rewards and log-probs on the held-out pairs, and write evaluation.json."""
    from dpofast.monitor.summary import write_json

    options = _with_reference(read_device_options(parsed.config, overrides))
    make_output_dir(options.config.output_dir, options.source)
    tokenizer = load_tokenizer_for(options)
    for name in (options.script.model, options.script.ref_model_name_or_path):
        refuse_missing_model(str(name))
    dataset = load_held_out_data(options)
    if dataset is None:
        raise ConfigError(f"{options.source}: {NO_HELD_OUT_PAIRS}")
    trainer = trainer_class(options)(
        model=load_policy_model(options),
        ref_model=load_reference_model(options),
        args=options.config,
        eval_dataset=dataset,
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    if is_main_process():
        path = Path(options.config.output_dir) / EVALUATION_FILE
        write_json(path, {**metrics, **trainer.run_summary()})
        _print_metrics(metrics, path)


def _with_reference(options: RunOptions) -> RunOptions:
    """Fill in the reference model of an adapter, which is the model below it.

    Raises:
        ConfigError: no reference is named, and the policy isn't an adapter.
    """
    options.require("model_name_or_path")
    script = options.script
    reference = script.ref_model_name_or_path or adapter_base(script.model)
    if reference is None:
        raise ConfigError(
            f"{options.source}: ref_model_name_or_path is missing; name the model that "
            f"{script.model!r} was trained from, since rewards are measured against it."
        )
    return replace(options, script=replace(script, ref_model_name_or_path=reference))


def _print_metrics(metrics: dict[str, float], path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "mean")
    table.columns[1].justify = "right"
    for name, value in metrics.items():
        table.add_row(name.removeprefix("eval_"), f"{value:.4f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"written to {path}")
