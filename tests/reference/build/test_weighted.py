"""Reference log-probs are summed with weights of their tokens as they are read."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from dpofast.errors import MissingRowsError, ReferenceStoreError
from dpofast.reference.build import weighted
from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.builder import BuildOptions, build_reference
from dpofast.reference.build.weighted import weighted_logps
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore
from tests.reference.stubs import StubScorer, batches_of, identity, pairs, stub_logps


def namespace(folder):
    return ReferenceStore.open(folder, create=True).namespace(identity())


def build(folder, dataset, **options):
    rows = namespace(folder)
    answers = read_answers(dataset)
    options = BuildOptions(progress=False, **options)
    report = build_reference(rows, answers, StubScorer(), batches=batches_of(4), options=options)
    return rows, report


def halves(lengths):
    """The weights 1, 1/2, 1/3, ... of the tokens of each chosen answer, and 2 of rejected ones."""
    return np.concatenate(
        [part for w, n in lengths.tolist() for part in (1 / np.arange(1, w + 1), np.full(n, 2.0))]
    )


def expected(dataset):
    def sums(pair):
        chosen, rejected = (
            stub_logps(pair["prompt_ids"], pair[f"{side}_ids"]).tolist()
            for side in ("chosen", "rejected")
        )
        return [sum(logp / (t + 1) for t, logp in enumerate(chosen)), 2 * sum(rejected)]

    return np.array([sums(pair) for pair in dataset])


def test_weighted_sums_are_those_of_a_loop_over_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(weighted, "PART_ANSWERS", 8)  # three parts
    dataset = pairs(10)
    rows, _ = build(tmp_path, dataset)
    found = weighted_logps(rows, read_answers(dataset), halves)
    assert found.shape == (10, 2)
    np.testing.assert_allclose(found, expected(dataset), rtol=1e-14)


def test_weighted_sums_of_an_answer_depend_on_the_pair_that_it_is_in(tmp_path):
    dataset = pairs(4)
    rows, _ = build(tmp_path, dataset)
    answers = {
        "prompt_ids": [ids for ids in dataset["prompt_ids"] for _ in (0, 1)],
        "completion_ids": [pair[f"{s}_ids"] for pair in dataset for s in ("chosen", "rejected")],
    }
    index = np.array([[0, 1], [1, 0], [6, 7], [2, 3]])
    pooled = read_answers(Dataset.from_dict(answers), index)
    picked = [dataset[0], {**dataset[0]}, dataset[3], dataset[1]]
    picked[1]["chosen_ids"], picked[1]["rejected_ids"] = (
        picked[1]["rejected_ids"],
        picked[1]["chosen_ids"],
    )
    np.testing.assert_allclose(weighted_logps(rows, pooled, halves), expected(picked), rtol=1e-14)


def test_an_empty_dataset_has_no_sums(tmp_path):
    found = weighted_logps(namespace(tmp_path), read_answers(pairs(3).select([])), halves)
    assert found.shape == (0, 2)


def test_sums_are_not_enough_and_the_error_says_so(tmp_path):
    dataset = pairs(6)
    rows, _ = build(tmp_path, dataset.select(range(4)), detail=RowDetail.SUMS)
    with pytest.raises(MissingRowsError) as caught:
        weighted_logps(rows, read_answers(dataset), halves)
    assert "lacks 12 of 12 reference log-probs, the first of row 0 (chosen): 8 of them are " in str(
        caught.value
    )
    assert "stored without per-token log-probs" in str(caught.value)


def test_only_what_has_less_detail_than_the_least_is_scored_again(tmp_path):
    dataset = pairs(6)
    build(tmp_path, dataset.select(range(2)), detail=RowDetail.SUMS)
    build(tmp_path, dataset.select(range(2, 5)), detail=RowDetail.LOGPS)
    rows, report = build(tmp_path, dataset, detail=RowDetail.LOGPS, least=RowDetail.LOGPS)
    assert (report.rows_found, report.rows_scored) == (6, 6)
    found = weighted_logps(rows, read_answers(dataset), halves)
    np.testing.assert_allclose(found, expected(dataset), rtol=1e-14)


def test_a_sum_that_no_reference_gives_is_refused(tmp_path):
    dataset = pairs(2)
    rows, _ = build(tmp_path, dataset)
    with pytest.raises(ReferenceStoreError, match=r"as the log-prob of row 0 \(chosen\)"):
        weighted_logps(rows, read_answers(dataset), lambda lengths: -np.ones(lengths.sum()))
