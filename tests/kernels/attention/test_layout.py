"""The layout of a packed row: positions, segments and copies of keys."""

from __future__ import annotations

import pickle
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpofast_kernels.attention import attends, build_layout
from dpofast_kernels.attention.layout import CopyRound, SharedLayout
from tests.kernels.attention.cases import GROUPS, MANY_TAILS, Groups, sequences_of
from tests.kernels.attention.plain_layout import plain_layout

groups_strategy = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=5).map(tuple)),
    min_size=1,
    max_size=6,
)


def test_a_pair_is_laid_out_as_it_is_drawn():
    layout = build_layout([(2, (1, 2)), (1, (0, 1))])
    assert layout.num_tokens == 7
    assert layout.position_ids.tolist() == [0, 1, 2, 2, 3, 0, 1]
    assert layout.group_ids.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert layout.tail_ids.tolist() == [0, 0, 1, 2, 2, 0, 2]
    assert layout.query_lengths == (3, 2, 2)
    assert layout.key_lengths == (3, 4, 2)
    assert layout.key_tokens.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert layout.cu_seqlens_q.tolist() == [0, 3, 5, 7]
    assert layout.cu_seqlens_k.tolist() == [0, 3, 7, 9]
    assert layout.position_ids.dtype == torch.int64
    assert layout.cu_seqlens_q.dtype == layout.cu_seqlens_k.dtype == torch.int32


def test_the_example_of_the_module():
    layout = build_layout([(2, (1, 2, 1))])
    assert layout.key_tokens.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 1, 5]
    assert layout.first_copies.tolist() == [0, 1, 2, 5, 6, 9]
    found = [(copies.tokens.tolist(), copies.places.tolist()) for copies in layout.later_copies]
    assert found == [([0, 1], [3, 4]), ([0, 1], [7, 8])]


@settings(max_examples=60, deadline=None)
@given(groups_strategy)
def test_everything_says_the_same(groups: Groups):
    """Segments, the naive mask and a list of the sequences agree on which token looks at which."""
    layout = build_layout(groups)
    num_tokens = sum(prefix + sum(tails) for prefix, tails in groups)
    assert layout.num_tokens == num_tokens

    by_sequence = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for tokens in sequences_of(groups):
        length = len(tokens)
        assert layout.position_ids[tokens].tolist() == list(range(length))
        by_sequence[tokens[:, None], tokens] |= torch.ones(length, length).tril().bool()
    assert torch.equal(attends(layout), by_sequence)

    by_segment = torch.zeros_like(by_sequence)
    limits_q, limits_k = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist()
    for queries, keys in zip(pairwise(limits_q), pairwise(limits_k), strict=True):
        tokens, key_tokens = torch.arange(*queries), layout.key_tokens[slice(*keys)]
        num_shared = len(key_tokens) - len(tokens)
        seen = torch.ones(len(tokens), len(key_tokens)).tril(num_shared).bool()
        by_segment[tokens[:, None], key_tokens] = seen
    assert torch.equal(by_segment, by_sequence)
    assert tuple(b - a for a, b in pairwise(limits_q)) == layout.query_lengths
    assert tuple(b - a for a, b in pairwise(limits_k)) == layout.key_lengths
    assert min(layout.query_lengths) > 0
    assert layout.max_key_length == max(map(len, sequences_of(groups)))


@settings(max_examples=100, deadline=None)
@given(groups_strategy)
def test_it_is_that_of_a_builder_that_goes_group_by_group(groups: Groups):
    assert_same_layout(build_layout(groups), plain_layout(groups))


def assert_same_layout(got: SharedLayout, expected: SharedLayout):
    for field in fields(SharedLayout):
        one, other = getattr(got, field.name), getattr(expected, field.name)
        if field.name == "later_copies":
            one = [each for copies in one for each in (copies.tokens, copies.places)]
            other = [each for copies in other for each in (copies.tokens, copies.places)]
        if isinstance(one, torch.Tensor):
            one, other = [one], [other]
        if isinstance(one, list):
            torch.testing.assert_close(one, other, rtol=0, atol=0)  # of the same dtypes, too
        else:
            assert one == other


@settings(max_examples=60, deadline=None)
@given(groups_strategy)
def test_copies_are_all_there_once(groups: Groups):
    layout = build_layout(groups)
    first = CopyRound(torch.arange(layout.num_tokens), layout.first_copies)
    rounds = [first, *layout.later_copies]
    everywhere = torch.cat([copies.places for copies in rounds])
    assert torch.equal(everywhere.sort().values, torch.arange(len(layout.key_tokens)))
    copied = torch.cat([copies.tokens for copies in rounds])
    assert torch.equal(layout.key_tokens[everywhere], copied)
    for copies in rounds:
        assert len(copies.tokens.unique()) == len(copies.tokens)


@pytest.mark.parametrize("window", [1, 3, 1000])
def test_a_window_counts_positions_and_the_token_itself(window: int):
    layout = build_layout(GROUPS)
    seen = attends(layout)
    mask = attends(layout, window)
    for query, key in seen.nonzero().tolist():
        distance = layout.position_ids[query] - layout.position_ids[key]
        assert mask[query, key] == (distance < window)
    assert not (mask & ~seen).any()
    assert mask.diagonal().all()


def test_moves_whole():
    layout = build_layout(MANY_TAILS)
    for moved in (layout.to("cpu"), pickle.loads(pickle.dumps(layout))):
        assert moved.query_lengths == layout.query_lengths
        assert torch.equal(moved.key_tokens, layout.key_tokens)
        assert len(moved.later_copies) == 3
    meta = layout.to("meta")
    tensors = [value for value in vars(meta).values() if isinstance(value, torch.Tensor)]
    tensors += [tensor for copies in meta.later_copies for tensor in vars(copies).values()]
    assert len(tensors) == 7 + 2 * len(layout.later_copies)
    assert all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "no groups"),
        ([(1, (1,)), (0, (2, 2))], "Group 1 has a prefix of 0"),
        ([(1, ())], r"Group 0 has tails of \[\]"),
        ([(1, (2, -1))], r"tails of \[2, -1\]"),
    ],
)
def test_refuses_what_is_no_row(groups: Groups, message: str):
    with pytest.raises(ValueError, match=message):
        build_layout(groups)
