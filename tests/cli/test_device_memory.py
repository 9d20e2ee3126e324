"""The memory of a CUDA device can grow in place, unless the user has said how it is kept."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import pytest
import torch

from dpofast.cli import device_memory
from dpofast.cli.device_memory import SETTING, VARIABLE, VARIABLES, read_device_options


@pytest.fixture
def read(monkeypatch, caplog):
    """-> a function that reads options for a device, and returns what PyTorch and the log got."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    caplog.set_level(logging.INFO, "dpofast.cli.device_memory")
    during = []

    def read_on(device, has_cuda=True):
        def options_of(yaml_file, overrides):
            during.append(os.environ.get(VARIABLE))
            return SimpleNamespace(config=SimpleNamespace(device=torch.device(device)))

        monkeypatch.setattr(device_memory, "read_options", options_of)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
        read_device_options(None, [])
        return during.pop(), os.environ.get(VARIABLE), len(caplog.messages)

    return read_on


def test_it_is_set_before_anything_uses_the_device_and_said_once(read, caplog):
    assert read("cuda:0") == (SETTING, SETTING, 1)
    assert f"{VARIABLE}={SETTING}" in caplog.messages[0]
    assert read("cuda:0") == (SETTING, SETTING, 1)  # a second run in the process finds it set


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_says_stays(read, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:128")
    during, after, num_lines = read("cuda:0")
    assert during == after != SETTING
    assert os.environ[name] == "max_split_size_mb:128"
    assert num_lines == 0


def test_nothing_is_set_without_cuda(read, monkeypatch):
    assert read("cpu", has_cuda=False) == (None, None, 0)
    assert read("cpu") == (SETTING, None, 0)  # with use_cpu, beside a GPU
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert read("cuda:0") == (None, None, 0)
