"""What the Trainer's loop reads while it runs, and what logs and checkpoints show of it."""

from __future__ import annotations

import json
import pickle

from dpofast import DPOConfig
from dpofast.train.loop_arguments import one_item_per_step
from tests.support import make_trainer


def test_logs_and_pickles_show_the_users_accumulation(tmp_path):
    config = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], gradient_accumulation_steps=8
    )
    before = config.to_dict()
    with one_item_per_step(config) as running:
        assert isinstance(running, DPOConfig)
        assert running.gradient_accumulation_steps == 1
        assert json.loads(running.to_json_string())["gradient_accumulation_steps"] == 8
        saved = pickle.loads(pickle.dumps(running))
        assert type(saved) is DPOConfig
        assert saved.to_dict() == before
        assert config.gradient_accumulation_steps == 8
    assert config.to_dict() == before


def test_the_loop_gets_them_and_the_trainer_its_own_back(tmp_path):
    trainer = make_trainer(tmp_path, options={"max_steps": 1})
    given, seen = trainer.args, []
    trainer.training_step = lambda step: lambda *args: (seen.append(trainer.args), step(*args))[1]
    trainer.training_step = trainer.training_step(type(trainer).training_step.__get__(trainer))
    trainer.train()
    assert trainer.args is trainer.config is given
    assert seen[0].gradient_accumulation_steps == 1
    assert given.gradient_accumulation_steps == 2
