"""A step of each kind of loss has the loss and all gradients of a textbook loop, in fp64."""

from __future__ import annotations

import pytest

from tests.exact_steps import KINDS, ROWS, assert_same_step, textbook_step, trained_step


@pytest.mark.parametrize("kind", KINDS)
def test_all_gradients_are_those_of_a_textbook_loop(tmp_path, kind):
    found = trained_step(tmp_path, KINDS[kind], per_device_train_batch_size=ROWS)
    assert_same_step(found, textbook_step(KINDS[kind]))
