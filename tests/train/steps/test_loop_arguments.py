"""The Trainer's loop reads an accumulation of 1; logs and checkpoints show the user's own value."""

from __future__ import annotations

import copy
import json
import pickle

from transformers import TrainerCallback

from dpofast import DPOConfig, DPOTrainer
from dpofast.train.steps.loop_arguments import one_item_per_step
from tests.support import make_trainer, train


def test_logs_and_pickles_show_the_users_accumulation(tmp_path):
    config = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], gradient_accumulation_steps=8
    )
    before = config.to_dict()
    with one_item_per_step(config) as running:
        assert isinstance(running, DPOConfig)
        assert repr(running) == repr(config)
        assert running.gradient_accumulation_steps == 1
        assert json.loads(running.to_json_string())["gradient_accumulation_steps"] == 8
        saved = pickle.loads(pickle.dumps(running))
        assert type(saved) is DPOConfig
        assert saved.to_dict() == before
        assert config.gradient_accumulation_steps == 8
    assert config.to_dict() == before


def test_the_loop_gets_a_view_and_the_trainer_its_own_back(tmp_path):
    seen = []

    class Watching(DPOTrainer):
        def training_step(self, *args, **kwargs):
            seen.append(self.args.gradient_accumulation_steps)
            return super().training_step(*args, **kwargs)

    trainer = make_trainer(tmp_path, options={"max_steps": 1}, trainer_class=Watching)
    given = trainer.args
    trainer.train()
    assert seen == [1]
    assert trainer.args is given
    assert given.gradient_accumulation_steps == 2


def test_what_a_callback_sets_holds_for_the_loop_and_for_the_user(tmp_path):
    """The view and the user's options are one set of values."""

    class Clip(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            given.max_grad_norm = 1e-3  # through the script's own object
            args.marker = "seen"  # through the loop's view of it

    trainer = make_trainer(tmp_path, callbacks=[Clip()])
    given = trainer.args
    clipped = train(trainer)
    free = train(make_trainer(tmp_path / "free"))
    assert clipped[0] == free[0]
    assert clipped[2:] != free[2:]
    assert given.marker == "seen"


def test_arguments_that_replace_the_trainers_are_used(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args = copy.copy(trainer.args)
    trainer.args.max_steps = 2
    replaced = trainer.args
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.args is replaced
