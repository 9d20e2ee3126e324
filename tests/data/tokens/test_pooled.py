"""Pooled pairs read as a dataset of these pairs does, and hold each answer once."""

from __future__ import annotations

import pickle

import datasets
import numpy as np
import pytest

from dpofast.columns import ID_COLUMNS
from dpofast.data import (
    PooledPairs,
    data_fingerprint,
    load_preferences,
    pairs_fingerprint,
    tokenize_ranked,
)
from dpofast.data.packing.likelihood import ChosenTokens
from dpofast.data.packing.pair_columns import PairColumns, number_column


def rows_of(num_rows, num_answers, length=6):
    """Rows whose answers have different scores; one in two counts twice."""
    return [
        {
            "prompt_ids": list(range(row + 1, row + 5)),
            "completions_ids": [[row, place, *range(length)] for place in range(num_answers)],
            "scores": [(3 * place) % num_answers for place in range(num_answers)],
            "weight": 1.0 + row % 2,
        }
        for row in range(num_rows)
    ]


def pooled_of(rows) -> PooledPairs:
    return tokenize_ranked(load_preferences(rows), None, max_length=None)[0]


POOLED = pooled_of(rows_of(5, 4))
# The plain reference: a Dataset with the same pairs, written out.
PLAIN = datasets.Dataset.from_list(
    [
        {
            "prompt_ids": POOLED.answers[chosen]["prompt_ids"],
            "chosen_ids": POOLED.answers[chosen]["completion_ids"],
            "rejected_ids": POOLED.answers[rejected]["completion_ids"],
            **columns,
        }
        for (chosen, rejected), columns in zip(
            POOLED.index.tolist(), POOLED.columns.to_pylist(), strict=True
        )
    ]
)


def test_it_reads_as_a_dataset_of_the_pairs():
    assert len(POOLED) == len(PLAIN) == 30
    assert list(POOLED.column_names) == PLAIN.column_names
    assert list(POOLED) == list(PLAIN)
    for key in (0, 29, -1, [3, 1, 1], slice(2, 9), slice(None, None, 7), range(4), np.arange(3)):
        assert POOLED[key] == PLAIN[key], key
    for name in PLAIN.column_names:
        assert POOLED[name] == PLAIN[name][:]
    assert list(POOLED.iter(batch_size=8)) == list(PLAIN.iter(batch_size=8))
    for key in (30, -31, [2, 30]):
        with pytest.raises(IndexError, match="there are 30 pairs"):
            POOLED[key]
    with pytest.raises(ValueError, match="no column 'label'"):
        POOLED["label"]


def test_selections_read_as_those_of_a_dataset():
    for indices in ([7, 2, 2], range(3, 6), np.array([1]), []):
        assert list(POOLED.select(indices)) == list(PLAIN.select(indices))
    some = POOLED.select_columns(["rejected_ids", "weight"])
    assert some[4] == PLAIN.select_columns(["rejected_ids", "weight"])[4]
    assert some.select([2, 0])[:] == PLAIN.select_columns(["rejected_ids", "weight"])[[2, 0]]


def test_arrow_tables_are_those_of_a_dataset():
    arrow, plain = POOLED.with_format("arrow"), PLAIN.with_format("arrow")
    assert arrow[:].to_pylist() == plain[:].to_pylist()
    assert arrow[3:5].to_pylist() == plain[3:5].to_pylist()
    assert [table.to_pylist() for table in arrow.iter(7)] == [
        table.to_pylist() for table in plain.iter(7)
    ]
    with pytest.raises(ValueError, match="'torch'"):
        POOLED.with_format("torch")


def test_pairs_are_written_out_as_a_dataset():
    assert POOLED.written_out().to_list() == PLAIN.to_list()
    assert POOLED.select([]).written_out().column_names == PLAIN.column_names


def test_what_a_run_reads_of_the_pairs_is_the_same():
    ours, plain = PairColumns.of(POOLED), PairColumns.of(PLAIN)
    np.testing.assert_array_equal(ours.weights, plain.weights)
    np.testing.assert_array_equal(number_column(POOLED, "weight"), number_column(PLAIN, "weight"))
    lengths = POOLED.lengths()
    np.testing.assert_array_equal(lengths[:, :2], [[4, 8]] * 30)
    assert lengths[:, 2].tolist() == [len(pair["rejected_ids"]) for pair in PLAIN]
    tokens = ChosenTokens.of_lengths(lengths[:, 0], lengths[:, 1])
    np.testing.assert_array_equal(tokens.prompts, ChosenTokens.of(PLAIN).prompts)
    np.testing.assert_array_equal(tokens.answers, ChosenTokens.of(PLAIN).answers)


def test_pairs_of_a_batch_share_their_lists_of_ids():
    batch = POOLED[:6]  # all pairs of the first row
    lists = [ids for name in ID_COLUMNS[1:] for ids in batch[name]]
    assert len({id(ids) for ids in lists}) == 4


def test_it_goes_to_the_processes_of_a_loader():
    there = pickle.loads(pickle.dumps(POOLED.select_columns(list(ID_COLUMNS))))
    assert list(there) == list(PLAIN.select_columns(list(ID_COLUMNS)))


def test_fingerprints_tell_answers_pairs_and_weights_apart():
    seen = {pairs_fingerprint(POOLED)}
    rows = rows_of(5, 4)
    other_ids = [{**rows[0], "prompt_ids": [9, 9, 9, 9]}, *rows[1:]]
    other_order = [{**rows[0], "scores": rows[0]["scores"][::-1]}, *rows[1:]]
    other_weight = [{**rows[0], "weight": 3.0}, *rows[1:]]
    for changed in (other_ids, other_order, other_weight, rows[:4]):
        seen.add(pairs_fingerprint(pooled_of(changed)))
    assert len(seen) == 5
    assert pairs_fingerprint(pooled_of(rows)) == pairs_fingerprint(POOLED)
    assert data_fingerprint(pooled_of(other_weight)) == data_fingerprint(POOLED)


def test_memory_grows_with_the_answers_and_the_index_of_pairs_alone():
    num_answers, length = 96, 500
    sizes = {}
    for count in (4, 8, 16):
        pooled = pooled_of(rows_of(num_answers // count, count, length))
        assert len(pooled) == num_answers * (count - 1) // 2
        per_pair = pooled.index.nbytes + pooled.columns.nbytes
        assert per_pair <= 48 * len(pooled)
        sizes[count] = len(pickle.dumps(pooled)) - per_pair
    # [4 + 502 ids of 4 bytes] for each answer, whether it is in 3 pairs or in 15.
    assert max(sizes.values()) < 1.05 * min(sizes.values()) < 1.3 * num_answers * (length + 6) * 4
