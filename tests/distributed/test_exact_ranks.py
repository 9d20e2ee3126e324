"""On two ranks, a step of each kind of loss has the gradients of a textbook loop, in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch
from tests.exact_steps import KINDS, assert_same_step, textbook_step

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("exact_ranks.py")
WAYS = ["ddp", "zero2"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(SCRIPT, 2, str(folder), *WAYS, timeout=600.0)
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_take_the_step_of_a_textbook_loop(two, kind, way):
    assert_same_step(torch.load(two / f"{way}.{kind}.pt"), textbook_step(KINDS[kind]))
