"""Errors that a user can fix: each is one sentence that says what is wrong and what to do.

A DataError about several bad rows has more lines: one for each of the first rows. So has a
ConfigError about several options.

The command line prints them without a traceback and exits with their `exit_code`.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import ClassVar


class DPOFastError(ValueError):
    """Base class of all errors that come from the user's input rather than from a bug.

    Attributes:
        exit_code: the exit code of a command that ends with this error.
    """

    exit_code: ClassVar[int] = 2


class ConfigError(DPOFastError):
    """An unknown option, or a value that can't be used; names the option."""


class SeveralOptionsError(ConfigError):
    """Several options that can't be used; a line for each."""


class DataError(DPOFastError):
    """A data file or row that can't be used; names the file and the row."""


class ModelError(DPOFastError):
    """A model that can't be trained exactly, or an incomplete model folder."""


class ReferenceStoreError(DPOFastError):
    """A reference store that can't be read or doesn't match; names its folder."""


class MissingRowsError(ReferenceStoreError):
    """Reference log-probs that are missing from the store; says how many and why."""


class CheckpointError(DPOFastError):
    """A checkpoint that can't be resumed from, or can't be written; names its folder."""


class DifferentRunError(CheckpointError):
    """A checkpoint of a run that differs from the one that resumes; a line for each difference."""


class NonFiniteError(DPOFastError):
    """A NaN or an infinity in a loss, a gradient or a weight; names the pairs or the tensor."""

    exit_code = 3


class RankError(DPOFastError):
    """Another rank of the run has failed, or hasn't been heard from; names its rank and host."""

    exit_code = 4


class StoppedBySignal(SystemExit):
    """A signal has stopped the training; a checkpoint was saved if there was anything to save.

    A script that doesn't catch it ends with exit code 128 + the signal's number, as shells report
    it: 143 for SIGTERM.

    Args:
        signum: the signal.
        checkpoint: the folder of the checkpoint that was saved; None if there is none.
    """

    def __init__(self, signum: int, checkpoint: str | None = None) -> None:
        super().__init__(128 + signum)
        self.signum, self.checkpoint = signal.Signals(signum), checkpoint


def options_error(sentences: Sequence[str]) -> ConfigError:
    """The error about one or several options, of which each has a sentence of its own."""
    if len(sentences) == 1:
        return ConfigError(sentences[0])
    lines = "".join(f"\n  {sentence}" for sentence in sentences)
    return SeveralOptionsError(f"{len(sentences)} options can't be used:{lines}")


def one_line(error: BaseException) -> str:
    """The message of another library's error on one line, to be quoted in one of ours."""
    return " ".join(str(error).split())
