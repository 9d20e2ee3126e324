"""Packed rows: each token sees its own sequence up to itself, and shared prefixes appear once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dpofast.data.packing.packed_row import collate_packed, packed_tokens, runs_of_prompts
from dpofast_kernels.attention import attends
from tests.data.packing.plain_rows import plain_packed

ids = st.lists(st.integers(3, 5), min_size=1, max_size=6)
pairs = st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=4)


def sequences_of(some_pairs):
    return [(prompt, answer) for prompt, *answers in some_pairs for answer in answers]


@given(pairs, st.booleans(), st.booleans())
def test_each_label_is_predicted_from_its_own_sequence(some_pairs, share, by_prompt):
    """A scored position attends to its own sequence up to there, in order."""
    sequences = sequences_of(some_pairs)
    batch = collate_packed(
        sequences, share=share, group_sizes=runs_of_prompts(sequences) if by_prompt else None
    )
    row, positions = batch.input_ids[0], batch.position_ids[0]
    looks_at = attends(batch.shared_layout)
    uses = torch.zeros_like(row)
    for index, (prompt, answer) in enumerate(sequences):
        start, end = batch.bounds[index : index + 2]
        assert batch.labels[start:end].tolist() == answer
        for offset, place in enumerate(batch.scored_positions[start:end].tolist()):
            expected = [*prompt, *answer][: len(prompt) + offset]
            seen = looks_at[place].nonzero()[:, 0]
            assert row[seen].tolist() == expected
            assert positions[seen].tolist() == list(range(len(expected)))
        # The last scored position attends to all tokens of its sequence except the last one.
        uses[looks_at[batch.scored_positions[end - 1]]] += 1
    ends = [len(prompt) + len(answer) for prompt, answer in sequences]
    assert batch.uses.sum() == sum(ends)
    assert (batch.uses[0] >= uses).all()
    assert batch.uses.max() <= (len(sequences) if by_prompt else 2)
    assert batch.num_pairs == len(some_pairs)
    assert batch.num_tokens == sum(len(prompt) + len(answer) for prompt, answer in sequences)


@given(pairs, st.booleans())
def test_lengths_are_counted_as_they_are_laid_out(some_pairs, share):
    batch = collate_packed(sequences_of(some_pairs), share=share)
    of_pairs = [packed_tokens(sequences_of([pair]), share=share) for pair in some_pairs]
    assert batch.num_body_tokens == sum(of_pairs)


@given(pairs, st.booleans(), st.booleans(), st.data())
def test_it_is_the_row_that_is_laid_out_token_by_token(some_pairs, share, by_prompt, data):
    sequences = sequences_of(some_pairs)
    sizes = runs_of_prompts(sequences) if by_prompt else None
    counts = data.draw(st.lists(st.integers(1, 3), min_size=len(sequences)))[: len(sequences)]
    prompts = data.draw(st.lists(st.sampled_from(range(len(sequences))), max_size=3))
    batch = collate_packed(sequences, None, share, sizes, counts, prompts)
    for name, expected in plain_packed(sequences, share, sizes, counts, prompts).items():
        assert getattr(batch, name).tolist() == expected
        assert getattr(batch, name).dtype == torch.int64


def test_all_neighbours_of_one_prompt_share_it_when_asked_to():
    sequences = [([1, 2], [3]), ([1, 2], [3, 4]), ([1, 2], [5]), ([1], [2])]
    batch = collate_packed(sequences, group_sizes=runs_of_prompts(sequences))
    assert batch.input_ids.tolist() == [[1, 2, 3, 3, 4, 5, 1, 2]]
    assert batch.scored_positions.tolist() == [1, 1, 3, 1, 6]
    assert batch.uses.tolist() == [[3, 3, 1, 1, 1, 1, 1, 1]]


def test_what_answers_begin_with_is_shared_too():
    batch = collate_packed([([1, 2], [3, 4, 5]), ([1, 2], [3, 4, 6, 7])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 5]]
    assert batch.scored_positions.tolist() == [1, 2, 3, 1, 2, 3, 5]
    assert batch.uses.tolist() == [[2, 2, 2, 2, 1, 1, 1]]


def test_an_answer_that_the_other_one_begins_with():
    batch = collate_packed([([1, 2], [3, 4]), ([1, 2], [3, 4, 6])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 6]]
    assert batch.scored_positions.tolist() == [1, 2, 1, 2, 3]
    assert batch.uses.tolist() == [[2, 2, 2, 2, 1]]


def test_no_sequences_give_a_row_with_nothing_scored():
    batch = collate_packed([], [])
    assert batch.input_ids.shape == (1, 1)
    assert batch.scored_positions.shape == batch.labels.shape == (0,)
    assert batch.bounds.tolist() == [0]
    assert batch.num_pairs == batch.num_tokens == 0
