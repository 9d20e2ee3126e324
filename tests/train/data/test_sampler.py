"""The plan of a run, which training follows and `dpofast inspect` shows."""

from __future__ import annotations

import pytest

from dpofast.data.packing.prompt_groups import PromptGroups
from dpofast.data.packing.token_limit import token_limit
from dpofast.errors import ConfigError
from dpofast.train.data.sampler import planned_steps, train_sampler
from tests.grouped import grouped_pairs
from tests.support import make_trainer, token_pairs


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens_per_microbatch": 40},
        {"layout": "unshared", "max_tokens_per_microbatch": 90, "dataloader_drop_last": True},
        {"train_sampling_strategy": "sequential"},
        {"data_seed": 11, "gradient_accumulation_steps": 1},
        {"group_by_prompt": True, "layout": "unshared", "max_tokens_per_microbatch": 90},
        {"group_by_prompt": True, "layout": "unshared", "train_sampling_strategy": "sequential"},
    ],
)
def test_it_gives_what_the_trainer_s_loader_runs(tmp_path, options):
    """Compare every token in two epochs."""
    pairs = grouped_pairs() if options.get("group_by_prompt") else token_pairs(11)
    trainer = make_trainer(tmp_path, pairs=pairs, options=options)
    loader = trainer.get_train_dataloader()
    limit = token_limit(PromptGroups.of(pairs), trainer.layout, trainer.loaders.row_tokens)
    prompts = trainer.train_set().prompts
    sampler = train_sampler(trainer.args, len(pairs), limit, prompts=prompts)
    assert len(sampler) == len(loader)
    for epoch in (0, 2):
        loader.set_epoch(epoch)
        sampler.set_epoch(epoch)
        for index, step in enumerate(loader):
            planned = sampler.step(index)
            assert planned.num_pairs == step.num_pairs
            for row, batch in zip(planned.micro_batches, step.micro_batches, strict=True):
                labels = [
                    token
                    for pair in row
                    for answer in ("chosen_ids", "rejected_ids")
                    for token in pairs[pair][answer]
                ]
                assert batch.labels.tolist() == labels


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": -1, "num_train_epochs": 2}, 6),
        ({"max_steps": -1, "num_train_epochs": 0.5}, 2),
        ({"max_steps": -1, "num_train_epochs": 2, "dataloader_drop_last": True}, 4),
    ],
)
def test_number_of_steps(tmp_path, options, steps):
    trainer = make_trainer(tmp_path, options=options)
    assert planned_steps(trainer.args, train_sampler(trainer.args, 10, None)) == steps


def test_a_run_of_no_step_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, options={"dataloader_drop_last": True})
    with pytest.raises(ConfigError, match="3 examples don't fill one step of 4"):
        planned_steps(trainer.args, train_sampler(trainer.args, 3, None))
