"""An optimizer or a schedule that can't be made stops the run before anything is scored."""

from __future__ import annotations

import pytest
from transformers import EarlyStoppingCallback

from dpofast.errors import ConfigError
from tests.support import make_trainer

WRONG = {
    "kwargs of no schedule": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"foo": 1}},
        "lr_scheduler_type: cosine can't be used with lr_scheduler_kwargs .*foo",
    ),
    "end above the rate": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}},
        "lr_scheduler_type: .*lr_end",
    ),
    "steps that are missing": ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type"),
    "a package that is missing": ({"optim": "galore_adamw"}, "optim: .*can't be used"),
}


@pytest.mark.parametrize(("options", "text"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_made_is_refused_before_scoring(tmp_path, options, text):
    trainer = make_trainer(tmp_path, **options)
    with pytest.raises(ConfigError, match=text):
        trainer.train()
    assert not trainer.reference.store.reports, "nothing was scored"


def test_early_stopping_without_a_metric_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(EarlyStoppingCallback())
    with pytest.raises(ConfigError, match="EarlyStoppingCallback"):
        trainer.train()


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt"])
def test_schedules_that_work_are_left_alone(tmp_path, kind):
    make_trainer(tmp_path, lr_scheduler_type=kind, warmup_steps=1, max_steps=2).train()
