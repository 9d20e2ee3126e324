"""LD-DPO's weights of tokens, and the micro-batches that have them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpofast.data.packing.collate import Layout
from dpofast.data.packing.ld_weights import ld_weights
from dpofast.data.packing.plan import PlannedStep
from dpofast.data.packing.step_dataset import StepDataset
from tests.support import token_pairs


def weights_of(lengths, alpha):
    return ld_weights(np.array(lengths, np.int64).reshape(-1, 2), alpha).tolist()


def test_only_the_end_of_the_longer_answer_counts_less():
    assert weights_of([(2, 4)], 0.3) == [1, 1, *(1, 1, 0.3, 0.3)]
    assert weights_of([(3, 1)], 0.0) == [*(1, 0, 0), 1]
    assert weights_of([(2, 2), (1, 2)], 0.5) == [1, 1, 1, 1, *(1,), *(1, 0.5)]
    assert weights_of([], 0.5) == []


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=6), st.floats(0, 1))
def test_they_are_those_of_a_loop_over_tokens(lengths, alpha):
    expected = [
        1.0 if place < min(pair) else alpha
        for pair in lengths
        for length in pair
        for place in range(length)
    ]
    assert weights_of(lengths, alpha) == expected


@pytest.mark.parametrize("layout", ["shared", "unshared", "padded"])
def test_a_micro_batch_has_the_weights_of_its_own_pairs(layout):
    pairs, ref_logps = token_pairs(5), np.zeros((5, 2))
    batches = ([4, 1], [], [2])  # a rank can have a micro-batch without pairs
    planned = PlannedStep(batches, 3)
    step = StepDataset(pairs, ref_logps, Layout(layout), ld_alpha=0.25).__getitems__(planned)
    for indices, batch in zip(batches, step.micro_batches, strict=True):
        chosen = pairs[indices]["chosen_ids"] if indices else []
        rejected = pairs[indices]["rejected_ids"] if indices else []
        lengths = list(zip(map(len, chosen), map(len, rejected), strict=True))
        assert batch.token_weights.tolist() == weights_of(lengths, 0.25)
        assert len(batch.token_weights) == len(batch.labels)
        assert batch.to("meta").token_weights.device.type == "meta"
    plain = StepDataset(pairs, ref_logps, Layout(layout)).__getitems__(planned)
    assert plain.micro_batches[0].token_weights is None
