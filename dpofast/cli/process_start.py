"""Sets up a command's process: shows our own log lines, but only errors of the libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current sys.stderr, which tests and notebooks replace."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def is_main_process() -> bool:
    """Whether this process is rank 0, the only rank that prints results."""
    return os.environ.get("RANK", "0") == "0"


def prepare_process() -> None:
    """Show dpofast's log lines on rank 0, and only errors of other ranks and of the libraries."""
    # tokenizers warns when a process forks, unless this variable is set; any value will do.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # DeepSpeed warns on every machine without a GPU. It resets the level of its logger when it is
    # imported, so a filter is needed.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|datasets|triton)\b")
    logger = logging.getLogger("dpofast")
    if not logger.handlers:  # `main` can run several times in one process
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    logger.propagate = False  # a handler of the root logger would print each line again
