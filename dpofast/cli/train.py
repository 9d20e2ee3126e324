"""`dpofast train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dpofast.cli.device_memory import read_device_options
from dpofast.cli.inputs import adapter_base, adapter_options, load_inputs, trainer_class
from dpofast.cli.process_start import is_main_process
from dpofast.cli.run_options import RunOptions
from dpofast.options.output_dir import make_output_dir, refuse_inputs_folder


def train(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Train, save the model, and print what came out and where it is."""
    options = read_device_options(parsed.config, overrides)
    options.require("model_name_or_path", "dataset_name")
    trainer = make_trainer(options)
    trainer.exports_model = True
    with trainer.alone_in_output_dir():
        trainer.train(resume_from_checkpoint=options.config.resume_from_checkpoint)
        trainer.save_model()
    if is_main_process():
        from dpofast.train.reports.card_facts import examples_of

        _print_result(Path(options.config.output_dir), examples_of(trainer))


def make_trainer(options: RunOptions) -> Any:
    """Make the trainer of the options."""
    output_dir, script = options.config.output_dir, options.script
    folders = {
        "model_name_or_path": script.model,
        "the model below the adapter": adapter_base(script.model),
        "ref_model_name_or_path": script.ref_model_name_or_path,
        "reference_store": options.config.reference_folder(),
    }
    refuse_inputs_folder(output_dir, folders, options.source)
    make_output_dir(output_dir, options.source)
    peft_config = adapter_options(options)
    inputs = load_inputs(options)
    trainer = trainer_class(options)(
        model=inputs.model,
        ref_model=inputs.ref_model,
        args=options.config,
        train_dataset=inputs.train_dataset,
        eval_dataset=inputs.eval_dataset,
        processing_class=inputs.tokenizer,
        peft_config=peft_config,
    )
    held_out = options.script.eval_dataset_name
    trainer.dataset_names = options.script.dataset_names
    trainer.eval_dataset_names = [held_out] if held_out else trainer.dataset_names
    return trainer


def _print_result(folder: Path, examples: str) -> None:
    """Print what has been trained; `examples` says of what, such as pairs."""
    from rich.console import Console

    from dpofast.monitor.callbacks import METRICS_FILE
    from dpofast.monitor.card import CARD_FILE
    from dpofast.monitor.guard import ReportGuard
    from dpofast.monitor.plots import PLOT_FILE
    from dpofast.monitor.summary import SUMMARY_FILE

    console = Console(highlight=False)
    with ReportGuard()(f"printing {SUMMARY_FILE}"):
        _print_summary(folder / SUMMARY_FILE, examples, console)
    console.print(f"model, {CARD_FILE}, {SUMMARY_FILE}, {METRICS_FILE} and {PLOT_FILE}: {folder}")


def _print_summary(path: Path, examples: str, console: Any) -> None:
    import json

    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary["resumed_at_end"]:
        console.print(f"{summary['global_step']} steps, all trained before this start")
    else:
        console.print(
            f"{summary['global_step']} steps, {summary['pairs_per_second']:.2f} {examples}/s, "
            f"first loss {summary['first_loss']:.4f}, mean loss {summary['train_loss']:.4f}"
        )
    console.print(
        f"reference: {summary['ref_forward_passes']} forward passes, "
        f"{summary['ref_store_hits']} answers found, {summary['ref_rows_scored']} scored"
    )
