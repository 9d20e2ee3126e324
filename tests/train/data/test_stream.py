"""A run over a stream trains as one over a list of the same rows."""

from __future__ import annotations

import itertools
import json

import datasets
import pytest
import torch

from dpofast.data import PairStream
from dpofast.errors import ConfigError, DataError
from dpofast.train.data import stream, stream_pairs
from tests.support import make_trainer, tiny_llama, token_pairs
from tests.train.data.stream_runs import ROWS, SEVERAL, TEXTS, logs_of, run, stream_of

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 7}


@pytest.fixture
def windows(monkeypatch):
    """Windows of two steps instead of hundreds."""
    monkeypatch.setattr(stream, "WINDOW_PAIRS", 8)


@pytest.mark.parametrize(("rows", "drop_last"), [(ROWS, False), (TEXTS, True), (SEVERAL, False)])
def test_a_stream_trains_bitwise_as_a_list_of_its_rows(tmp_path, windows, rows, drop_last):
    """Three passes over the stream: a pass ends with a smaller step, or drops its pairs."""
    options = {"dataloader_drop_last": drop_last, "max_tokens_per_microbatch": 60}
    of_list, expected = run(tmp_path, rows, options=options)
    streamed, logs = run(tmp_path, stream_of(rows), options=options)
    assert logs == expected
    assert len(logs) == 7
    assert streamed.reference.store.totals().rows_scored == 0  # those of the list's run were read
    report, of_stream = of_list.train_set().report, streamed.train_set().report
    assert of_stream == report
    assert of_stream.pairs_kept == len(of_list.train_dataset)
    one, other = (trainer.model.state_dict() for trainer in (of_list, streamed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def lora(**options):
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    return {"peft_config": peft.LoraConfig(target_modules=["q_proj"], r=4, **options)}


REFERENCES = {
    "the whole policy": lambda: {},
    "a fresh adapter": lora,
    "an adapter that isn't fresh": lambda: lora(init_lora_weights=False),
    "a ref_model": lambda: {"ref_model": tiny_llama(seed=9)},
}


# The others take the same ways, and seconds together.
FAST_REFERENCES = ("the whole policy", "a fresh adapter")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST_REFERENCES else pytest.mark.slow)
        for name in REFERENCES
    ],
)
def test_rows_that_are_read_while_the_policy_moves_get_its_first_log_probs(tmp_path, windows, name):
    """The answers of a window are scored apart from the others, so only rounding differs."""
    options = {"learning_rate": 0.05, "max_steps": 4}
    rows = token_pairs(16).to_list()
    _, expected = run(tmp_path / "list", rows, options=options, **REFERENCES[name]())
    trainer, logs = run(tmp_path / "stream", stream_of(rows), options=options, **REFERENCES[name]())
    assert trainer.reference.store.totals().rows_scored == 32
    assert [log["rewards/margins"] for log in expected[2:]] != [0, 0]  # it has moved
    del logs[0]["rewards/accuracies"], expected[0]["rewards/accuracies"]  # rounding decides
    for log, other in zip(logs, expected, strict=True):
        for figure in other:
            assert log[figure] == pytest.approx(other[figure], rel=1e-4, abs=1e-5), figure


def test_the_first_weights_are_kept_only_if_they_are_needed(tmp_path, caplog, windows):
    caplog.set_level("INFO", logger="dpofast")
    run(tmp_path / "one", stream_of(ROWS), options={"max_steps": 2})
    assert "first weights are kept" not in caplog.text
    run(tmp_path / "more", stream_of(ROWS), options={"max_steps": 3})
    assert caplog.text.count("first weights are kept in the memory of the CPU") == 1


def test_an_endless_stream_is_read_a_window_at_a_time(tmp_path, windows):
    read = itertools.count()

    def endless():
        while True:
            yield ROWS[next(read) % 10]

    trainer, logs = run(
        tmp_path, datasets.IterableDataset.from_generator(endless), options={"max_steps": 3}
    )
    assert len(logs) == 3
    assert next(read) <= 12 + 1
    assert trainer.train_set().report.pairs_read == 12


def test_another_call_of_train_begins_the_stream_again(tmp_path, windows):
    trainer, first = run(tmp_path, stream_of(ROWS), options={"max_steps": 3})
    trainer.train()
    assert [log["num_tokens"] for log in logs_of(trainer)] == [log["num_tokens"] for log in first]


def test_a_reference_build_scores_what_the_run_needs(tmp_path, windows):
    for steps, needed in ((2, 16), (30, 20)):  # 30 steps are ten passes
        trainer = make_trainer(tmp_path, pairs=stream_of(ROWS), options={"max_steps": steps})
        trainer.score_datasets()
        assert trainer.reference.store.totals().rows_needed == needed
    trainer.train_set().config.max_steps = 3
    trainer.train()
    assert trainer.reference.store.totals().rows_scored == 4  # those that the second build added


def test_the_summary_has_the_report_and_how_far_the_stream_was_read(tmp_path, windows, caplog):
    caplog.set_level("INFO", logger="dpofast")
    options = {"max_steps": 4, "train_sampling_strategy": "random", "dataloader_num_workers": 2}
    run(tmp_path, stream_of(TEXTS), options=options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    data = summary["data"]["train"]
    assert (data["pairs_read"], data["pairs_kept"]) == (11, 9)
    assert data["left_out"] == {"identical answers": [2], "empty answer": [7]}
    assert data["stream"] == {"epoch": 1, "row": 5}
    assert summary["packing"]["steps"] == 2
    assert summary["pairs_trained"] == 4 + 4 + 1 + 4
    for line in (
        "call dataset.shuffle(seed=..., buffer_size=...)",
        "dataloader_num_workers has no effect on a stream",
        "train: 11 pairs read, 9 kept",
        "the stream has ended after 3 steps, and begins again",
        "answers needed",
        "Layout: shared",
    ):
        assert caplog.text.count(line) == 1, line


def test_max_steps_says_when_a_run_over_a_stream_ends(tmp_path):
    with pytest.raises(ConfigError, match="max_steps: train is a stream"):
        make_trainer(tmp_path, pairs=stream_of(ROWS), options={"max_steps": -1})
    with pytest.raises(DataError, match="generator, which can be read only once"):
        make_trainer(tmp_path, pairs=(row for row in ROWS))


USELESS = {
    "no rows": ([], "holds no rows"),
    "identical answers": (
        [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3,
        r"all 3 pairs were left out \(identical answers 3\)",
    ),
    "bad rows": ([{"prompt": "a", "chosen": 1, "rejected": "b"}] * 3, "3 of 3 rows can't be used"),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_stream_without_a_usable_pair_is_refused(tmp_path, name):
    rows, message = USELESS[name]
    options = {"skip_bad_rows": True}
    for source in (rows, stream_of(rows)):
        with pytest.raises(DataError, match=message):
            make_trainer(tmp_path, pairs=source, options=options)


def test_an_endless_stream_without_a_usable_pair_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_pairs, "USELESS_ROWS", 50)
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    first = {**same, "rejected": "c"}
    endless = itertools.repeat(same)
    for rows, message in (
        (lambda: endless, "pairs were left out"),
        (lambda: itertools.chain([first], endless), "rows up to row .* have no pair"),
    ):
        source = datasets.IterableDataset.from_generator(rows)
        with pytest.raises(DataError, match=message):
            make_trainer(tmp_path, pairs=source)


def test_pairs_that_never_fill_a_step_are_refused(tmp_path):
    options = {"dataloader_drop_last": True}
    with pytest.raises(ConfigError, match="3 examples don't fill one step of 4"):
        make_trainer(tmp_path, pairs=stream_of(ROWS[:3]), options=options)


class Once(torch.utils.data.IterableDataset):
    """A stream of PyTorch's that can't be read again."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


def test_a_stream_that_does_not_begin_again_is_refused(tmp_path):
    _, logs = run(tmp_path, Once(ROWS), options={"max_steps": 3})
    assert len(logs) == 3
    with pytest.raises(DataError, match="gave 3 steps, and nothing when it was read again"):
        run(tmp_path, Once(ROWS), options={"max_steps": 4})


def test_bad_rows_stop_the_run_with_their_number_or_are_skipped(tmp_path, windows):
    rows = [dict(row) for row in TEXTS]
    rows[9]["chosen"] = 5
    for source in (rows, stream_of(rows)):
        with pytest.raises(DataError, match=r"train, row 9 .*chosen is not text but int 5"):
            run(tmp_path, source)
    skipping = {"skip_bad_rows": True, "max_steps": 3}
    (of_list, expected), (streamed, logs) = (
        run(tmp_path, source, options=skipping) for source in (rows, stream_of(rows))
    )
    assert logs == expected
    assert streamed.train_set().report == of_list.train_set().report
    with pytest.raises(DataError, match=r"row 2 .*chosen and rejected are identical"):
        make_trainer(tmp_path, pairs=stream_of(rows), options={"strict": True})


def test_after_an_error_no_row_is_passed_over(tmp_path, windows):
    """A row that can't be read at first is read by the next call, with the rows before it."""
    fails = [True]

    def rows():
        for index, row in enumerate(ROWS):
            if index == 9 and fails.pop():
                fails.append(False)
                raise ConnectionError("no network")
            yield row

    options = {**SAVING, "max_steps": 3}
    _, expected = run(tmp_path, ROWS, options={**options, "save_strategy": "no"})
    stream = datasets.IterableDataset.from_generator(rows)
    trainer = make_trainer(tmp_path, pairs=stream, options=options)
    with pytest.raises(DataError, match="beyond row 8"):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert logs_of(trainer) == expected


def test_log_probs_that_come_with_the_rows_are_used(tmp_path, windows):
    rows = [{**row, "ref_chosen_logps": -20.0 - i, "ref_rejected_logps": -21.0}
            for i, row in enumerate(ROWS)]  # fmt: skip
    options = {"max_steps": 3}
    _, expected = run(tmp_path, rows, options=options)
    trainer, logs = run(tmp_path, stream_of(rows), options=options)
    assert logs == expected
    assert trainer.reference.store.totals() is None
    rows[9] = ROWS[9]
    with pytest.raises(DataError, match="of row 9 is not a finite number"):
        run(tmp_path, stream_of(rows), options=options)
    rows = [*ROWS[:9], {**ROWS[9], "ref_chosen_logps": -20.0, "ref_rejected_logps": -21.0}]
    with pytest.raises(DataError, match="of row 8 is not a finite number"):
        run(tmp_path, stream_of(rows), options=options)


def test_an_evaluation_set_is_read_to_its_end(tmp_path, windows):
    held_out = token_pairs(4, seed=4)
    losses = [
        make_trainer(tmp_path, eval_dataset=source).evaluate()["eval_loss"]
        for source in (held_out, held_out.to_iterable_dataset())
    ]
    assert losses[0] == losses[1]
    whole = [trainer.evaluate(trainer.train_dataset)["eval_loss"] for trainer in (
        make_trainer(tmp_path, pairs=ROWS), make_trainer(tmp_path, pairs=stream_of(ROWS))
    )]  # fmt: skip
    assert whole[0] == whole[1]


def test_names_beside_those_of_a_pair_stream_are_refused_unless_they_are_the_same(tmp_path):
    names = {"prompt_ids": "asked", "chosen_ids": "good", "rejected_ids": "bad"}
    rows = token_pairs(8).rename_columns(names)
    given = PairStream(rows.to_iterable_dataset(), columns=names)
    assert make_trainer(tmp_path, pairs=given, columns=names).train_set().brings_ref_logps is False
    for more in ({"columns": {"prompt_ids": "good"}}, {"roles": {"human": "user"}}):
        (name,) = more
        with pytest.raises(ConfigError, match=f"^{name}: train_dataset is a PairStream, which has"):
            make_trainer(tmp_path, pairs=given, **more)
    with pytest.raises(ConfigError, match=r"^answer_pairs: train_dataset is a PairStream, which"):
        make_trainer(tmp_path, pairs=given, columns=names, answer_pairs="all")
