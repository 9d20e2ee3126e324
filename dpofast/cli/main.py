"""Runs a command; turns errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence

from dpofast.cli.parser import build_parser, split_arguments
from dpofast.errors import ConfigError, DPOFastError

# No fault of the program: no room, no right, or a medium that can only be read.
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
EXIT_USAGE = 2  # the input's fault
EXIT_INTERRUPTED = 130  # what shells report for Ctrl-C
EXIT_PIPE = 141  # and for a closed pipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; -> exit code: 0, 2 for an error that the user can mend, 130, 141.

    Args:
        arguments: without the program's name; by default those of the process.
    """
    head, overrides = split_arguments(list(sys.argv[1:] if arguments is None else arguments))
    parser = build_parser()
    parsed = parser.parse_args(head)
    if parsed.version:
        from dpofast import __version__

        print(f"dpofast {__version__}")
        return 0
    if parsed.command is None:
        parser.print_help()
        return EXIT_USAGE
    try:
        _command(parsed)(parsed, overrides)
    except DPOFastError as error:
        _report(error)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("dpofast: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # who reads our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        _report(DPOFastError(f"{error.filename or 'a file'} can't be written: {error.strerror}."))
        return EXIT_USAGE
    return 0


def _command(parsed: argparse.Namespace) -> Callable[[argparse.Namespace, list[str]], None]:
    """The function of a command, whose module is imported only now."""
    from dpofast.cli.quiet import prepare_process

    prepare_process()
    match parsed.command:
        case "train":
            from dpofast.cli.train import train

            return train
        case "eval":
            from dpofast.cli.evaluate import evaluate

            return evaluate
        case "inspect":
            from dpofast.cli.inspect import show

            return show
        case "ref":
            from dpofast.cli.reference import reference

            return reference
        case _:
            from dpofast.cli.demo import demo

            return demo


def _report(error: DPOFastError) -> None:
    """One line on stderr; an error in the options is the same on every rank, so rank 0 says it."""
    rank = int(os.environ.get("RANK", "0"))
    if rank and isinstance(error, ConfigError):
        return
    sentence = " ".join(str(error).split())
    print(f"dpofast: error: {f'rank {rank}: ' if rank else ''}{sentence}", file=sys.stderr)
