from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from dpofast.errors import ReferenceStoreError
from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.builder import BuildOptions, build_reference, reference_logps
from dpofast.reference.build.ranks import Ranks
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore
from tests.reference.stubs import StubScorer, batches_of, expected_logps, identity, pairs

QUIET = BuildOptions(progress=False)


def namespace(folder, **changes):
    return ReferenceStore.open(folder, create=True).namespace(identity(**changes))


def build(rows, dataset, scorer=None, num_answers=4, **arguments):
    arguments = {"options": QUIET, "batches": batches_of(num_answers), **arguments}
    answers = read_answers(dataset)
    return build_reference(rows, answers, scorer or StubScorer(), **arguments)


def stored_logps(rows, dataset):
    return reference_logps(rows, read_answers(dataset))


def test_the_second_build_scores_nothing_and_gives_the_same(tmp_path):
    dataset = pairs(10)
    scorer = StubScorer()
    report = build(namespace(tmp_path), dataset, scorer)
    assert (report.rows_needed, report.rows_found, report.rows_scored) == (20, 0, 20)
    assert report.forward_passes == len(scorer.calls) == 5
    assert report.seconds > 0
    again = StubScorer()
    report = build(namespace(tmp_path), dataset, again)
    assert (report.rows_needed, report.rows_found, report.rows_scored) == (20, 20, 0)
    assert report.forward_passes == len(again.calls) == 0
    got = stored_logps(namespace(tmp_path), dataset)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, expected_logps(dataset))


def test_order_and_batches_do_not_matter(tmp_path):
    dataset = pairs(10)
    build(namespace(tmp_path), dataset)
    shuffled = dataset.shuffle(seed=1)
    assert build(namespace(tmp_path), shuffled, num_answers=1).rows_scored == 0
    got = stored_logps(namespace(tmp_path), shuffled)
    np.testing.assert_array_equal(got, expected_logps(shuffled))


def test_one_added_pair_costs_one_call_and_two_rows(tmp_path):
    dataset = pairs(10)
    build(namespace(tmp_path), dataset)
    more = concatenate_datasets([pairs(1, seed=5), dataset])
    report = build(namespace(tmp_path), more, num_answers=2)
    assert (report.rows_found, report.rows_scored, report.forward_passes) == (20, 2, 1)


def test_an_answer_in_many_pairs_is_scored_once(tmp_path):
    prompt, good, bad = [1, 2], [3], [[4], [5], [6]]
    rows = [{"prompt_ids": prompt, "chosen_ids": good, "rejected_ids": ids} for ids in bad]
    dataset = Dataset.from_list([*rows, *rows])
    scorer = StubScorer()
    report = build(namespace(tmp_path), dataset, scorer)
    assert (report.rows_needed, report.rows_scored) == (4, 4)
    assert sorted(answer for _, answer in scorer.scored) == [[3], [4], [5], [6]]
    got = stored_logps(namespace(tmp_path), dataset)
    np.testing.assert_array_equal(got, expected_logps(dataset))


def test_ranks_share_the_work_and_all_see_all_rows(tmp_path):
    dataset = pairs(25)
    barrier = threading.Barrier(3, timeout=30)
    scorers, reports, logps = [StubScorer() for _ in range(3)], {}, {}

    def work(rank):
        rows = namespace(tmp_path)
        ranks = Ranks(rank, 3, barrier.wait)
        reports[rank] = build(rows, dataset, scorers[rank], ranks=ranks)
        logps[rank] = stored_logps(rows, dataset)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(3):
        np.testing.assert_array_equal(logps[rank], expected_logps(dataset))
        assert reports[rank].rows_found == 0
        assert reports[rank].forward_passes == len(scorers[rank].calls) in (4, 5)
    scored = [repr(sequence) for scorer in scorers for sequence in scorer.scored]
    assert len(scored) == len(set(scored)) == 50


def test_ranks_that_do_not_share_a_folder_score_everything(tmp_path):
    dataset = pairs(8)
    rows = namespace(tmp_path)
    report = build(rows, dataset, ranks=Ranks(1, 2))
    assert report.rows_scored == 16
    np.testing.assert_array_equal(stored_logps(rows, dataset), expected_logps(dataset))


class StoppingScorer(StubScorer):
    def __init__(self, calls, error):
        super().__init__()
        self.left, self.error = calls, error

    def __call__(self, sequences):
        if not self.left:
            raise self.error
        self.left -= 1
        return super().__call__(sequences)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_what_was_scored_before_an_exception_is_kept(tmp_path, error):
    dataset = pairs(10)
    with pytest.raises(type(error)):
        build(namespace(tmp_path), dataset, StoppingScorer(3, error))
    report = build(namespace(tmp_path), dataset)
    assert (report.rows_found, report.rows_scored) == (12, 8)
    np.testing.assert_array_equal(
        stored_logps(namespace(tmp_path), dataset), expected_logps(dataset)
    )


class LaterScorer(StubScorer):
    """Acts like a device: a call only starts, and its scores are there when they are asked for."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.events, self.fails_at = [], fails_at

    def __call__(self, sequences):
        number = len(self.calls)
        self.events.append(("start", number))
        scores = super().__call__(sequences)

        def read():
            self.events.append(("read", number))
            if number == self.fails_at:
                raise RuntimeError("the device is gone")
            return scores

        return read


def test_a_call_is_started_before_the_scores_of_the_last_one_are_read(tmp_path):
    dataset, scorer = pairs(10), LaterScorer()
    options = BuildOptions(commit_rows=4, progress=False)
    report = build(namespace(tmp_path), dataset, scorer, options=options)
    assert (report.rows_scored, report.forward_passes) == (20, 5)
    started, read = ([n for what, n in scorer.events if what == each] for each in ("start", "read"))
    assert started == read == [0, 1, 2, 3, 4]
    for number in range(4):
        before = scorer.events.index(("start", number + 1))
        assert before < scorer.events.index(("read", number)) < before + 2
    # The same rows are in the same segments, whose names end in the checksum of their contents.
    build(namespace(tmp_path / "other"), dataset, options=options)
    of_each = [
        sorted(path.stem.split("-")[2] for path in (folder / identity().digest).glob("*.arrow"))
        for folder in (tmp_path, tmp_path / "other")
    ]
    assert of_each[0] == of_each[1]
    assert len(of_each[0]) == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_calls_that_a_device_has_begun_are_kept_if_the_next_one_cannot_start(tmp_path, error):
    class Stopping(LaterScorer):
        def __call__(self, sequences):
            if len(self.calls) == 3:
                raise error
            return super().__call__(sequences)

    dataset = pairs(10)
    with pytest.raises(type(error)):
        build(namespace(tmp_path), dataset, Stopping())
    assert build(namespace(tmp_path), dataset).rows_found == 12


def test_a_device_that_fails_is_named_and_the_calls_before_are_kept(tmp_path):
    dataset = pairs(10)
    with pytest.raises(RuntimeError, match="the device is gone"):
        build(namespace(tmp_path), dataset, LaterScorer(fails_at=2))
    assert build(namespace(tmp_path), dataset).rows_found == 8 + 4  # call 3 was begun, and is right


@pytest.mark.parametrize(
    ("options", "visible"),
    [
        (BuildOptions(commit_rows=8, progress=False), [0, 0, 8, 8, 16]),
        (BuildOptions(commit_seconds=0.0, progress=False), [0, 4, 8, 12, 16]),
        (QUIET, [0, 0, 0, 0, 0]),
    ],
    ids=["rows", "seconds", "neither"],
)
def test_work_is_committed_in_intervals(tmp_path, options, visible):
    seen = []

    class Watching(StubScorer):
        def __call__(self, sequences):
            seen.append(len(namespace(tmp_path)))
            return super().__call__(sequences)

    build(namespace(tmp_path), pairs(10), Watching(), options=options)
    assert seen == visible


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_log_prob_that_is_not_finite_stops_the_build_and_names_the_row(tmp_path, value):
    dataset = pairs(10).add_column("row", list(range(30, 40)))
    bad = (dataset[4]["prompt_ids"], dataset[4]["rejected_ids"])

    class Broken(StubScorer):
        def __call__(self, sequences):
            scored = super().__call__(sequences)
            for place, sequence in enumerate(sequences):
                if sequence == bad:
                    scored[place][0] = value
            return scored

    with pytest.raises(ReferenceStoreError, match=r"row 34 \(rejected\)"):
        build(namespace(tmp_path), dataset, Broken(), num_answers=20)
    report = build(namespace(tmp_path), dataset)
    assert (report.rows_found, report.rows_scored) == (19, 1)


@pytest.mark.parametrize("cut", [lambda x: x[:-1], lambda x: [x[0][:-1], *x[1:]]])
def test_a_scorer_that_leaves_out_a_value_is_refused(tmp_path, cut):
    dataset = pairs(4)
    scorer = StubScorer()
    with pytest.raises(ReferenceStoreError, match="each token of each answer"):
        build(namespace(tmp_path), dataset, lambda sequences: cut(scorer(sequences)))
    assert len(namespace(tmp_path)) == 0


def test_missing_rows_are_counted_and_explained(tmp_path):
    dataset = pairs(6)
    rows = namespace(tmp_path)
    with pytest.raises(ReferenceStoreError, match=r"lacks 12 of 12.*row 0 \(chosen\).*is new"):
        stored_logps(rows, dataset)
    build(rows, dataset)
    with pytest.raises(ReferenceStoreError, match=r"lacks 2 of 14.*row 6 \(chosen\).*new answers"):
        stored_logps(rows, concatenate_datasets([dataset, pairs(1, seed=9)]))
    with pytest.raises(ReferenceStoreError, match=r"12 rows of this reference, but of other"):
        stored_logps(rows, pairs(6, seed=9))
    other = namespace(tmp_path, config={"rope_theta": 5e5})
    with pytest.raises(ReferenceStoreError, match=r"1 other.*config.rope_theta: 10000.0 there, 5"):
        stored_logps(other, dataset)


class DetailedScorer(StubScorer):
    def __call__(self, sequences):
        return [np.stack([logps, 3 - logps]) for logps in super().__call__(sequences)]


def test_rows_in_less_detail_are_missing_to_a_build_that_asks_for_more(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dpofast.reference.build.builder")
    dataset, more = pairs(6), pairs(8)
    detailed = BuildOptions(progress=False, detail=RowDetail.LOGSUMEXPS)
    build(namespace(tmp_path), dataset)
    rows = namespace(tmp_path)
    report = build(rows, dataset, DetailedScorer(), options=detailed)
    assert (report.rows_found, report.rows_scored) == (0, 12)
    assert report.reason == "12 of them are stored without log-sum-exps"
    assert (
        "12 answers needed, 0 in the store with log-sum-exps, 12 to score (12 of them are stored "
        "without log-sum-exps)"
    ) in caplog.messages[-1]
    assert build(rows, dataset, DetailedScorer(), options=detailed).rows_scored == 0
    assert build(rows, dataset).rows_scored == 0  # a row with more detail will do
    report = build(rows, concatenate_datasets([more, dataset]), options=QUIET)
    assert (report.rows_found, report.rows_scored) == (12, 4)
    report = build(
        rows,
        concatenate_datasets([more, dataset, pairs(1, seed=9)]),
        DetailedScorer(),
        options=detailed,
    )
    assert (report.rows_found, report.rows_scored) == (12, 6)
    assert report.reason == (
        "4 of them are stored without log-sum-exps; "
        "the rest are new answers, or were cut or tokenised in another way"
    )


def test_where_sums_are_enough_any_row_will_do(tmp_path):
    dataset = pairs(6)
    rows = namespace(tmp_path)
    build(rows, dataset, options=BuildOptions(progress=False, detail=RowDetail.SUMS))
    assert rows.counts().of_detail == {
        RowDetail.SUMS: 12,
        RowDetail.LOGPS: 0,
        RowDetail.LOGSUMEXPS: 0,
    }
    options = BuildOptions(progress=False, least=RowDetail.SUMS)
    assert build(rows, dataset, options=options).rows_scored == 0
    np.testing.assert_array_equal(stored_logps(rows, dataset), expected_logps(dataset))
    more = concatenate_datasets([dataset, pairs(1, seed=9)])
    assert build(rows, more, options=options).rows_scored == 2
    assert rows.counts().of_detail[RowDetail.LOGPS] == 2  # the rows that this build added


def test_a_scorer_without_the_log_sum_exps_that_were_asked_for_is_refused(tmp_path):
    options = BuildOptions(progress=False, detail=RowDetail.LOGSUMEXPS)
    with pytest.raises(ReferenceStoreError, match=r"row \d \(\w+\) have no log-sum-exps"):
        build(namespace(tmp_path), pairs(6), options=options)
    assert len(namespace(tmp_path)) == 0


def test_the_log_says_what_was_found_and_why_the_rest_is_missing(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dpofast.reference.build.builder")
    dataset = pairs(6)
    build(namespace(tmp_path), dataset, description="train")
    build(namespace(tmp_path), dataset, description="train")
    build(namespace(tmp_path, weights="cd" * 16), dataset, description="train")
    first, second, third = (record.getMessage() for record in caplog.records)
    assert "train: 12 answers needed, 0 in the store, 12 to score (the store is new)" in first
    assert "12 in the store, 0 to score; no forward pass of the reference" in second
    assert "differs in weights" in third


def test_the_bar_is_shown_only_if_there_is_something_to_score(tmp_path, capsys):
    dataset = pairs(6)
    shown = BuildOptions()
    build(namespace(tmp_path), dataset, options=shown, description="train")
    assert "train, 12 answers: 100%" in capsys.readouterr().err
    build(namespace(tmp_path), dataset, options=shown)
    build(namespace(tmp_path, weights="cd" * 16), dataset, options=shown, ranks=Ranks(1, 2))
    assert capsys.readouterr().err == ""
