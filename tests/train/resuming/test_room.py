"""The room that a run's saves need is compared with the disk before anything is trained."""

from __future__ import annotations

import shutil
from collections import namedtuple
from types import SimpleNamespace

import pytest

from dpofast import DPOConfig
from dpofast.errors import ConfigError
from dpofast.model.parts import num_bytes
from dpofast.train.resuming.room import check_room, most_checkpoints, save_size
from tests.support import tiny_llama

Usage = namedtuple("Usage", "total used free")


def config_of(**options) -> DPOConfig:
    return DPOConfig(**{"use_cpu": True, "optim": "adamw_torch", "report_to": [], **options})


def test_a_save_is_the_weights_and_the_optimizers_states():
    model = tiny_llama()
    weights = sum(map(num_bytes, model.parameters()))
    size = save_size(model, config_of())
    assert (size.model, size.least, size.likely) == (weights, 3 * weights, 3 * weights)
    for options in ({"save_only_model": True}, {"optim": "sgd"}):
        assert save_size(model, config_of(**options)).least == weights
    assert save_size(model, config_of(), has_own_optimizer=True).least == weights


def test_the_size_is_that_of_the_files(tmp_path):
    import torch

    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    least = save_size(model, config_of()).least
    assert least <= written < 1.1 * least


@pytest.mark.parametrize(
    ("given", "options", "moments"),
    [
        ({}, {}, 2),
        ({}, {"optim": "adafactor"}, 0),
        ({"optimizer": {"type": "AdamW"}}, {"optim": "sgd"}, 2),
        ({"optimizer": {"type": "Lion"}}, {}, 0),
    ],
)
def test_deepspeeds_states_are_float32(given, options, moments):
    model = tiny_llama()
    weights = sum(map(num_bytes, model.parameters()))  # float32, too
    config = config_of(**options)
    config.deepspeed_plugin = SimpleNamespace(deepspeed_config=given)
    assert save_size(model, config).least == (2 + moments) * weights


def test_a_node_that_saves_for_itself_may_have_few_of_the_states(monkeypatch):
    model = tiny_llama()
    weights = sum(map(num_bytes, model.parameters()))
    monkeypatch.setattr(DPOConfig, "world_size", 4)
    config = config_of(save_on_each_node=True)
    config.deepspeed_plugin = SimpleNamespace(deepspeed_config={})
    assert save_size(model, config).least == weights + 3 * weights // 4


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"save_steps": 2}, 5),
        ({"save_steps": 3}, 4),  # and one at the end
        ({"save_steps": 0.2}, 5),
        ({"save_steps": 2, "save_total_limit": 1}, 2),
        ({"save_steps": 2, "save_total_limit": 3}, 4),
        ({"save_steps": 10, "save_total_limit": 3}, 1),
        ({"save_strategy": "epoch", "num_train_epochs": 3}, 3),
        (
            {
                "save_steps": 2,
                "save_total_limit": 1,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "load_best_model_at_end": True,
            },
            3,
        ),
    ],
)
def test_the_most_checkpoints_at_once(options, most):
    assert most_checkpoints(config_of(**options), num_steps=10) == most


def test_what_does_not_fit_is_refused_or_said(tmp_path, monkeypatch, caplog):
    model = tiny_llama()
    config = config_of(save_steps=2, save_total_limit=1)
    size = save_size(model, config)
    needed = 2 * size.likely + size.model

    def check(free, have=0, config=config, exports=False, num_steps=10):
        caplog.clear()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 9, free))
        check_room(tmp_path, size, config, num_steps, have=have, exports=exports)
        return caplog.text

    assert check(needed) == ""
    said = check(needed - 1)
    for part in (f"{needed:,} bytes", "2 checkpoints at once", f"{needed - 1:,} bytes are free"):
        assert part in said
    assert check(needed - size.likely, have=1) == ""
    with pytest.raises(ConfigError) as error:
        check(size.least - 1)
    for part in (f"{size.least:,}", f"{size.least - 1:,} bytes are free", str(tmp_path)):
        assert part in str(error.value)
    # A run that is done saves its model, and no checkpoint.
    assert check(size.model, exports=True, num_steps=0) == ""
    nothing_saved = config_of(save_strategy="no")
    assert check(size.model, config=nothing_saved) == ""
    assert f"the model {size.model:,}" in check(size.model - 1, config=nothing_saved)
    assert check(size.model, config=nothing_saved, exports=True) == ""
    with pytest.raises(ConfigError, match=r"^output_dir: the model takes "):
        check(size.model - 1, config=nothing_saved, exports=True)

    def fail(_):
        raise OSError(5, "no answer")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    check_room(tmp_path, size, config, 10)
