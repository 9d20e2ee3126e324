"""Errors that a user can mend: one sentence that names what is wrong and what to do.

The command line prints them without a traceback and exits with 2.
"""

from __future__ import annotations


class DPOFastError(ValueError):
    """Base of all errors that are the input's fault, not the program's."""


class ConfigError(DPOFastError):
    """An option that does not exist, or a value that can't be used; names the option."""


class DataError(DPOFastError):
    """A data file or row that can't be used; names the file and the row."""


class ModelError(DPOFastError):
    """A model that can't be trained exactly, or a model folder that lacks something."""


class ReferenceStoreError(DPOFastError):
    """A reference store that can't be read or doesn't match; names its folder."""


class MissingRowsError(ReferenceStoreError):
    """Reference log-probs that the store lacks; says how many and why."""
