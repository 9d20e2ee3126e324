"""A run over a stream that doesn't give the same rows again is stopped when it is resumed."""

from __future__ import annotations

import datasets
import pytest
import torch

from dpofast.errors import DataError
from dpofast.train.data import stream
from tests.support import history, make_trainer, token_pairs, train

ROWS = token_pairs(24).to_list()
OPTIONS = {"train_sampling_strategy": "sequential", "max_steps": 4, "save_strategy": "steps"}
OPTIONS |= {"save_steps": 1}


def stream_of(rows):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run over two windows of two steps each."""
    folder = tmp_path_factory.mktemp("stream")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WINDOW_PAIRS", 8)
        train(make_trainer(folder, pairs=stream_of(ROWS), options=OPTIONS))
    return folder


# Within the first window, at its end, and at the end of the second one.
@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.slow
def test_other_pairs_at_the_place_of_a_checkpoint_stop_the_run(finished, monkeypatch, step):
    monkeypatch.setattr(stream, "WINDOW_PAIRS", 8)
    checkpoint = str(finished / "run" / f"checkpoint-{step}")
    options = {**OPTIONS, "max_steps": 5, "save_strategy": "no"}
    # Only the last steps' pairs have changed places, as by a shuffle without a seed.
    first = 0 if step < 3 else 8
    other = [*ROWS[:first], *reversed(ROWS[first:])]
    trainer = make_trainer(finished, pairs=stream_of(other), options=options)
    with pytest.raises(DataError, match=rf"^train: from row {first} of pass 0 .* shuffle a seed"):
        trainer.train(resume_from_checkpoint=checkpoint)
    more = [*ROWS, *token_pairs(3, seed=5).to_list()]  # of which the resumed run reads nothing
    trainer = make_trainer(finished, pairs=stream_of(more), options=options)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert len(history(trainer)) == 5


def test_ignore_data_skip_takes_whatever_comes(finished):
    options = {**OPTIONS, "ignore_data_skip": True, "save_strategy": "no"}
    trainer = make_trainer(finished, pairs=stream_of(ROWS[::-1]), options=options)
    trainer.train(resume_from_checkpoint=str(finished / "run" / "checkpoint-3"))
    assert len(history(trainer)) == 4


class OneDict(torch.utils.data.IterableDataset):
    """Fills the same dict for every row."""

    def __iter__(self):
        row = {}
        for each in ROWS:
            row.update(each)
            yield row


def test_rows_in_one_dict_are_read_as_they_come(tmp_path):
    pairs = make_trainer(tmp_path, pairs=OneDict()).train_set().window(0).dataset.pairs
    assert pairs.select_columns(list(ROWS[0])).to_list() == ROWS
