"""Padded rows: each label comes right after the position that predicts it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dpofast.data.packing.padded_rows import collate_padded
from tests.data.packing.plain_rows import plain_padded

ids = st.lists(st.integers(3, 5), min_size=1, max_size=6)
SEQUENCES = [([5, 6, 7], [8, 9]), ([5, 6, 7], [8]), ([1], [2, 3, 4, 5]), ([1], [9])]


def test_scored_positions_are_those_before_each_label():
    batch = collate_padded(SEQUENCES, [0.0, 1.0, 2.0, 3.0], pad_token_id=0)
    assert batch.input_ids.tolist()[1] == [5, 6, 7, 8, 0]
    flat = batch.input_ids.flatten()
    # Each label comes right after the position that predicts it.
    assert torch.equal(flat[batch.scored_positions + 1], batch.labels)
    assert batch.labels.tolist() == [8, 9, 8, 2, 3, 4, 5, 9]
    assert batch.bounds.tolist() == [0, 2, 3, 7, 8]
    assert batch.num_pairs == 2
    assert batch.num_tokens == 5 + 4 + 5 + 2
    assert batch.ref_logps.dtype == torch.float64


@given(st.lists(st.tuples(ids, ids, st.integers(1, 3)), max_size=6), st.data())
def test_it_is_the_rows_that_are_laid_out_token_by_token(rows, data):
    sequences = [(prompt, answer) for prompt, answer, _ in rows]
    counts = [count for *_, count in rows]
    prompts = data.draw(st.lists(st.sampled_from(range(len(rows))), max_size=3)) if rows else []
    batch = collate_padded(sequences, None, 7, counts, prompts)
    for name, expected in plain_padded(sequences, 7, counts, prompts).items():
        assert getattr(batch, name).tolist() == expected
        assert getattr(batch, name).dtype == torch.int64


def test_no_sequences_give_a_row_with_nothing_scored():
    batch = collate_padded([], [])
    assert batch.input_ids.shape == (1, 1)
    assert batch.scored_positions.numel() == batch.labels.numel() == 0
    assert batch.bounds.tolist() == [0]
    assert batch.num_pairs == batch.num_tokens == 0
    assert batch.scored_positions.dtype == batch.labels.dtype == torch.int64
