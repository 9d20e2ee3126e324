"""What the commands print: our own lines, and of the libraries only what matters."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at the time, as tests and notebooks replace it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def is_main_process() -> bool:
    """Whether this is the process that speaks, among those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def prepare_process() -> None:
    """Show dpofast's own log lines on rank 0, and the libraries' from errors on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # DeepSpeed warns of every machine without a GPU, and sets its logger's level by itself.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|datasets|triton)\b")
    logger = logging.getLogger("dpofast")
    if not logger.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    logger.propagate = False
