"""`dpofast inspect`."""

from __future__ import annotations

import argparse

from dpofast.cli.loading import load_tokenizer_for, load_training_data
from dpofast.cli.options import read_options
from dpofast.cli.reading import COMMAND_LINE
from dpofast.cli.values import checked_value
from dpofast.errors import ConfigError


def show_pair(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Print a training pair: its tokens, what is masked, shared and cut."""
    from rich.console import Console

    from dpofast.inspect import render_row

    row, others = _row_number(overrides)
    options = read_options(parsed.config, others)
    options.require("dataset_name")
    if options.script.tokenizer_name_or_path is None:
        options.require("model_name_or_path")
    tokenizer = load_tokenizer_for(options)
    pairs = load_training_data(options)
    if not 0 <= row < len(pairs):
        raise ConfigError(f"--row: got {row}, but the data's rows are 0 to {len(pairs) - 1}.")
    console = Console(highlight=False)
    console.print(
        render_row(
            pairs[row],
            tokenizer,
            max_length=options.config.max_length,
            truncation_mode=options.config.truncation_mode,
        )
    )


def _row_number(overrides: list[str]) -> tuple[int, list[str]]:
    """The value of --row, which is this command's own, and the other overrides."""
    for index, word in enumerate(overrides):
        if word == "--row" or word.startswith("--row="):
            equals = word.startswith("--row=")
            value = word[6:] if equals else "".join(overrides[index + 1 : index + 2])
            rest = overrides[:index] + overrides[index + (1 if equals else 2) :]
            return checked_value("--row", value, int, COMMAND_LINE), rest
    return 0, overrides
