"""Runs a command, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence

from dpofast.cli.parser import build_parser, split_arguments
from dpofast.cli.report import report, report_bug, report_interrupt, report_stop
from dpofast.errors import DPOFastError, StoppedBySignal

# Errors of the machine, not of the program: no space, no permission, or a read-only disk.
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
EXIT_USAGE = 2  # an error that the user can fix
EXIT_PIPE = 141  # the code that shells report for a closed pipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words of the command line after the program's name; by default sys.argv[1:].

    Returns:
        Exit code: 0, EXIT_USAGE, EXIT_PIPE, that of the error, or 128 + the number of a signal.
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
        command = _command(parsed)
        from dpofast.progress import bars_as_lines

        with bars_as_lines():
            command(parsed, overrides)
    except DPOFastError as error:
        return report(error)
    except StoppedBySignal as stopped:
        return report_stop(stopped)
    except KeyboardInterrupt as error:
        return report_interrupt(error)
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        # Python flushes stdout once more at exit, which would print another error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            return report_bug(error)
        return report(
            DPOFastError(f"{error.filename or 'a file'} can't be written: {error.strerror}.")
        )
    except Exception as error:
        return report_bug(error)
    return 0


def _command(parsed: argparse.Namespace) -> Callable[[argparse.Namespace, list[str]], None]:
    """The function that runs a command. Its module is imported here, so that `--help` is fast."""
    from dpofast.cli.process_start import prepare_process
    from dpofast.ranks.watch import watch_ranks

    prepare_process()
    watch_ranks()
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
