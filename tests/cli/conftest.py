"""A model for the commands, and a fixture that undoes what they change in the process."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpofast.demo.model import make_tokenizer
from tests.support import tiny_llama


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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small model with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = make_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
