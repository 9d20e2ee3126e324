from __future__ import annotations

import struct

import numpy as np
import pytest
from xxhash import xxh3_128_digest

from dpofast.reference.store.keys import KeyIndex, TokenLists, row_key, row_keys, unique_keys


def test_a_key_is_the_documented_hash():
    content = struct.pack("<q3qq2q", 3, 5, 6, 7, 2, 8, 9)
    assert row_key([5, 6, 7], [8, 9]) == xxh3_128_digest(content)


def test_where_the_prompt_ends_is_part_of_the_key():
    keys = {row_key([1, 2], [3]), row_key([1], [2, 3]), row_key([1, 2, 3], [0]), row_key([], [1])}
    assert len(keys) == 4


def test_many_keys_at_once_are_those_made_one_by_one():
    rows = [([1, 2], [3]), ([], [70_000]), ([5] * 40, [2**40]), ([1, 2], [3])]
    keys = row_keys(TokenLists.of(p for p, _ in rows), TokenLists.of(a for _, a in rows))
    assert [key.tobytes() for key in keys] == [row_key(*row) for row in rows]
    first, inverse = unique_keys(keys)
    np.testing.assert_array_equal(first[inverse], [0, 1, 2, 0])


@pytest.mark.parametrize("num_rows", [0, 1, 1000])
def test_the_index_finds_what_is_there_and_nothing_else(num_rows):
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (num_rows, 16), dtype=np.uint8)
    index = KeyIndex(keys)
    order = rng.permutation(num_rows)
    np.testing.assert_array_equal(index.find(keys[order]), order)
    others = rng.integers(0, 256, (50, 16), dtype=np.uint8)
    assert (index.find(others) == -1).all()
    assert (index.find(np.full((1, 16), 255, np.uint8)) == -1).all()


def test_keys_with_the_same_first_half_are_told_apart():
    keys = np.zeros((5, 16), np.uint8)
    keys[:, 15] = [4, 2, 0, 2, 1]
    wanted = np.zeros((6, 16), np.uint8)
    wanted[:, 15] = range(6)
    np.testing.assert_array_equal(KeyIndex(keys).find(wanted), [2, 4, 1, -1, 0, -1])
