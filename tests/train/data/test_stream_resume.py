"""A run over a stream goes on where it stopped, with the rows and the reference that are due."""

from __future__ import annotations

import json
import shutil

import datasets
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from dpofast.errors import CheckpointError, ReferenceStoreError
from dpofast.train.data import stream
from tests.support import byte_tokenizer, tiny_llama, token_pairs
from tests.train.data.stream_runs import ROWS, SEVERAL, run, stream_of

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 7}


@pytest.fixture
def windows(monkeypatch):
    """Windows of two steps instead of hundreds."""
    monkeypatch.setattr(stream, "WINDOW_PAIRS", 8)


KINDS = {
    "plain": lambda: stream_of(ROWS),
    "shuffled": lambda: stream_of(ROWS).shuffle(seed=5, buffer_size=4),
    "several answers": lambda: stream_of(SEVERAL),
    "mapped": lambda: stream_of(ROWS).map(lambda rows: rows, batched=True, batch_size=3),
    "interleaved": lambda: datasets.interleave_datasets(
        [token_pairs(6).to_iterable_dataset(), token_pairs(7, seed=1).to_iterable_dataset(2)],
        probabilities=[0.4, 0.6],
        seed=3,
        stopping_strategy="all_exhausted",
    ),
}


@pytest.mark.parametrize(
    "kind",
    [
        # The others take seconds together.
        pytest.param(kind, marks=[] if kind == "shuffled" else pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_a_resumed_run_goes_on_at_the_right_row(tmp_path, windows, kind):
    """From a step within a window, at its end, and in the second pass, with and without a store."""
    _, expected = run(tmp_path, KINDS[kind](), options=SAVING)
    assert len({json.dumps(log) for log in expected}) == 7
    for step in (1, 2, 5):
        checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
        options = {**SAVING, "save_strategy": "no"}
        _, logs = run(tmp_path, KINDS[kind](), resume=checkpoint, options=options)
        assert logs == expected, step
    shutil.rmtree(tmp_path / "store")
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    trainer, logs = run(tmp_path, KINDS[kind](), resume=checkpoint, options=options)
    assert trainer.reference.store.totals().rows_scored > 0
    # Answers of a shuffled second pass are scored in other company than in the first one.
    if kind == "plain":
        assert logs == expected
    for log, other in zip(logs, expected, strict=True):
        assert log["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_resumed_run_passes_over_the_rows_before_its_window(tmp_path, windows):
    read = []

    def rows():
        for row in token_pairs(32).to_list():
            read.append(row)
            yield row

    def logged():
        return datasets.IterableDataset.from_generator(rows)

    run(tmp_path, logged(), options={**SAVING, "max_steps": 6})
    assert len(read) == 24
    read.clear()
    trainer, _ = run(tmp_path, logged(), resume=True, options={**SAVING, "max_steps": 7})
    # The first window is read when the trainer is made. Then 16 rows are passed over. The window
    # of the checkpoint's last step is compared with the checkpoint, and 4 further rows are used.
    assert len(read) == 8 + 16 + 8 + 4
    assert trainer.train_set().report.pairs_read == 8 + 8 + 4


@pytest.mark.slow  # four runs
def test_with_ignore_data_skip_the_stream_is_read_as_a_list_would_be(tmp_path, windows):
    options = {**SAVING, "save_strategy": "no", "ignore_data_skip": True}
    logs = []
    for name, pairs in (("list", ROWS), ("stream", stream_of(ROWS))):
        run(tmp_path / name, pairs, options={**SAVING, "max_steps": 3})
        checkpoint = str(tmp_path / name / "run" / "checkpoint-2")
        logs.append(run(tmp_path / name, pairs, resume=checkpoint, options=options)[1])
    assert [log["num_tokens"] for log in logs[0]] == [log["num_tokens"] for log in logs[1]]
    losses = [[log["loss"] for log in each] for each in logs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    options = {**options, "per_device_train_batch_size": 1}
    with pytest.raises(CheckpointError, match="pairs_per_step: 4 in the checkpoint, 2 now"):
        run(tmp_path / "stream", stream_of(ROWS), resume=checkpoint, options=options)


@pytest.mark.slow  # the model is loaded from disk three times
def test_resumed_from_the_moved_policy_the_reference_is_loaded_once_and_kept(
    tmp_path, windows, caplog
):
    """No store is kept, so all answers are scored again, from the model that the run began with."""
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    options = {**SAVING, "precompute_ref_log_probs": False, "max_steps": 6}
    rows = token_pairs(24).to_list()
    _, expected = run(tmp_path, stream_of(rows), model=str(tmp_path / "model"), options=options)
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    moved = AutoModelForCausalLM.from_pretrained(checkpoint)
    caplog.set_level("INFO", logger="dpofast")
    _, logs = run(tmp_path, stream_of(rows), model=moved, resume=checkpoint, options=options)
    assert logs == expected
    assert caplog.text.count("The reference was loaded again from") == 1


@pytest.mark.slow  # the model is loaded from disk twice
def test_a_reference_that_is_gone_stops_the_run_with_the_reason(tmp_path, windows):
    options = {**SAVING, "precompute_ref_log_probs": False}
    run(tmp_path, stream_of(ROWS), options=options)
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    moved = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ReferenceStoreError, match="is another model now"):
        run(tmp_path, stream_of(ROWS), model=moved, resume=checkpoint, options=options)
