"""The commands and their help. This file imports nothing heavy, so `--help` answers at once."""

from __future__ import annotations

import argparse
from typing import NoReturn

from dpofast.cli.script_options import script_help

# Commands that take a YAML file and any option as an override, with their line of help.
_CONFIGURED = {
    "train": "train a model on preference pairs",
    "eval": "measure a trained model on held-out pairs",
    "inspect": "show a pair, or the packed rows of a step, as the model will see them",
}
_DPO_OPTIONS = """\
  beta, loss_type, label_smoothing, max_length, truncation_mode, learning_rate, max_steps,
  num_train_epochs, per_device_train_batch_size, gradient_accumulation_steps, bf16, eval_strategy,
  save_strategy, resume_from_checkpoint, reference_store, output_dir, seed, ... and every other
  option of transformers' TrainingArguments: docs/configuration.md lists them.
"""


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one sentence; argparse itself prints the whole usage."""

    def error(self, message: str) -> NoReturn:
        """End the process with exit code 2."""
        sentence = message[0].lower() + message[1:]
        self.exit(2, f"dpofast: error: {sentence}; see `{self.prog} --help`.\n")


def build_parser() -> Parser:
    """Build the parser of the command and its arguments; `read_overrides` reads the options."""
    parser = Parser(
        prog="dpofast",
        description="Direct Preference Optimization: stored reference log-probs, no logits.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in _CONFIGURED.items():
        _add_configured(commands, name, summary)
    _add_reference(commands)
    demo = commands.add_parser(
        "demo",
        help="train a small model on generated pairs and see that it learns",
        description="Make a small model, a tokenizer and preference pairs; warm the model up; "
        "train it by DPO; compare before and after. Fetches nothing. With several losses or betas, "
        "train the same model with each combination and compare them.",
        allow_abbrev=False,
    )
    demo.add_argument(
        "--output-dir", "--output_dir", default="runs/demo", help="default: %(default)s"
    )
    demo.add_argument(
        "--loss-type",
        "--loss_type",
        nargs="+",
        default=["sigmoid"],
        metavar="LOSS",
        help="losses to train with, each by itself; default: sigmoid, which is DPO",
    )
    demo.add_argument(
        "--beta",
        nargs="+",
        type=float,
        default=[1.0],
        help="betas to train with; default: 1, as a tiny model drifts away easily",
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of data and weights")
    return parser


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the part that argparse reads and the part that we read ourselves.

    Returns:
        The command with its arguments, and the options, from the first word that begins with
        `--`. The second list is empty for commands that don't take the options of a run.
    """
    # DeepSpeed's launcher puts --local_rank in front. LOCAL_RANK has the same value, so we drop it.
    arguments = [text for text in arguments if not text.startswith("--local_rank=")]
    is_configured = bool(arguments) and arguments[0] in _CONFIGURED
    takes_overrides = is_configured or arguments[:2] in (["ref", "build"], ["ref", "export"])
    # The parser answers --help wherever it is in the command line.
    if not takes_overrides or {"-h", "--help"} & set(arguments):
        return arguments, []
    words = 1 if is_configured else 2
    command, rest = arguments[:words], _file_first(arguments[words:])
    options = (index for index, text in enumerate(rest) if text.startswith("--"))
    first = next(options, len(rest))
    return [*command, *rest[:first]], rest[first:]


def _file_first(arguments: list[str]) -> list[str]:
    """Put the YAML file first where it is given as TRL's commands take it: `--config FILE`."""
    for index, text in enumerate(arguments):
        name, equals, file = text.partition("=")
        if name != "--config":
            continue
        end = index + (1 if equals else 2)
        if not equals:
            file = "".join(arguments[index + 1 : end])  # empty if nothing follows
        if file and not file.startswith("--"):
            return [file, *arguments[:index], *arguments[end:]]
    return arguments


def _add_reference(commands: argparse._SubParsersAction[Parser]) -> None:
    reference = commands.add_parser(
        "ref",
        help="build, describe, verify, prune or export stored reference log-probs",
        description="The reference store: log-probs of answers under reference models.",
        allow_abbrev=False,
    )
    actions = reference.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_configured(actions, "build", "score what a run will need, and keep it")
    _add_configured(actions, "export", "write the training pairs with their stored log-probs")
    for name, summary in (
        ("info", "say what a store holds"),
        ("verify", "read every byte of a store and check it"),
        ("prune", "merge segments, drop duplicate rows, forget references"),
    ):
        action = actions.add_parser(
            name, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False
        )
        action.add_argument(
            "folder", nargs="?", help="folder of the store; by default dpofast/reference in HF_HOME"
        )
        if name == "prune":
            action.add_argument(
                "--forget",
                nargs="+",
                default=[],
                metavar="DIGEST",
                help="references to delete, by the first 6 characters or more that `info` shows",
            )


def _add_configured(commands: argparse._SubParsersAction[Parser], name: str, summary: str) -> None:
    own = {"inspect": " [--row N | --step N [--rank R/RANKS]]", "export": " --output FILE"}
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary.capitalize()}.",
        usage=f"%(prog)s [CONFIG.yaml]{own.get(name, '')} [--OPTION VALUE ...]",
        epilog=_options_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="options, one a line")


def _options_help() -> str:
    lines = [f"  {name:24}{text}" for name, text in script_help().items()]
    return "\n".join(
        ["options, in the file or as --OPTION VALUE, which wins:", *lines, "", _DPO_OPTIONS]
    )
