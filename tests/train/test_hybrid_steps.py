"""Twenty steps of a hybrid on real pairs, in rows that share prefixes, equal padded DPO."""

from __future__ import annotations

import pytest

from tests.hybrid_steps import (
    distinct_tokens,
    hybrid_pairs,
    hybrid_trainer,
    padded_history,
    planned_rows,
    watch_body,
)
from tests.real_pairs import assert_is_plain_dpo
from tests.support import train


@pytest.mark.slow
def test_a_hybrid_trains_as_padded_dpo_with_two_models(tmp_path):
    pairs = hybrid_pairs()
    trainer = hybrid_trainer(tmp_path, pairs)
    body_tokens = watch_body(trainer)
    found = train(trainer)
    rows = planned_rows(trainer)
    # Earlier calls belong to the check that runs before step 1.
    assert body_tokens[-len(rows) :] == rows
    assert sum(rows) == distinct_tokens(pairs)
    assert_is_plain_dpo("hybrid", found, padded_history(pairs))
