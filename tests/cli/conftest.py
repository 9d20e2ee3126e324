"""Leaves the process as it was: a command sets up logging and warnings for a process of its own."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def restored_process() -> Iterator[None]:
    environment = dict(os.environ)
    logger = logging.getLogger("dpofast")
    before = (logger.handlers[:], logger.level, logger.propagate)
    deepspeed_filters = logging.getLogger("DeepSpeed").filters[:]
    with warnings.catch_warnings():
        yield
    logger.handlers[:], logger.level, logger.propagate = before
    logging.getLogger("DeepSpeed").filters[:] = deepspeed_filters
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
