"""Errors that a user can fix: each is one sentence that says what is wrong and what to do.

A DataError about several bad rows has more lines: one for each of the first rows. So has a
ConfigError about several options.

The command line prints them without a traceback and exits with status 2.
"""

from __future__ import annotations

from collections.abc import Sequence


class DPOFastError(ValueError):
    """Base class of all errors that come from the user's input rather than from a bug."""


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


def options_error(sentences: Sequence[str]) -> ConfigError:
    """The error about one or several options, of which each has a sentence of its own."""
    if len(sentences) == 1:
        return ConfigError(sentences[0])
    lines = "".join(f"\n  {sentence}" for sentence in sentences)
    return SeveralOptionsError(f"{len(sentences)} options can't be used:{lines}")


def one_line(error: BaseException) -> str:
    """The message of another library's error on one line, to be quoted in one of ours."""
    return " ".join(str(error).split())
