"""The batch sizes that DeepSpeed is told, and those that logs and checkpoints show."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from dpofast import DPOConfig
from dpofast.errors import ConfigError
from dpofast.train.steps.loop_arguments import one_item_per_step
from dpofast.zero.config import BATCH_FIELDS


def config(tmp_path, **options):
    """Make options for three pairs in each of four micro-batches, on one rank."""
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, **options}
    return DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], **{"bf16": False, **options}
    )


def told(args):
    """-> the batch fields of the configuration that transformers and accelerate share."""
    plugin = args.deepspeed_plugin
    assert plugin.hf_ds_config is args.hf_deepspeed_config
    assert plugin.deepspeed_config is args.hf_deepspeed_config.config
    return tuple(plugin.deepspeed_config.get(field) for field in BATCH_FIELDS)


def own(*values, **more):
    named = zip(BATCH_FIELDS, values, strict=True)
    batch = {name: value for name, value in named if value is not None}
    return {**batch, "zero_optimization": {"stage": 2}, **more}


@pytest.mark.parametrize("values", [(12, 3, 4), ("auto", "auto", "auto"), (12, "auto", None)])
def test_deepspeed_is_told_one_item_a_step_and_the_user_sees_their_own_batch(tmp_path, values):
    given, shown = own(*values), (12, 3, 4)
    before = copy.deepcopy(given)
    args = config(tmp_path, deepspeed=given)
    text = args.to_json_string()
    assert told(args) == shown
    with one_item_per_step(args) as running:
        assert told(args) == told(running) == (12, 12, 1)
        assert running.to_json_string() == text
        saved = pickle.loads(pickle.dumps(running))
        assert told(saved) == shown
        assert (saved.deepspeed, saved.gradient_accumulation_steps) == (before, 4)
        assert told(args) == (12, 12, 1)
    assert told(args) == shown
    assert given == args.deepspeed == before
    with one_item_per_step(saved):  # a checkpoint's arguments can be trained with
        assert told(saved) == (12, 12, 1)


def test_the_option_is_shown_as_it_was_given(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps(own(12, 3, 4)))
    for given in ("zero2", str(file)):
        args = config(tmp_path, deepspeed=given)
        assert args.deepspeed == args.to_dict()["deepspeed"] == given
    assert config(tmp_path).deepspeed is None


@pytest.mark.parametrize(
    ("deepspeed", "options", "message"),
    [
        (own(13, 3, 4), {}, r"train_batch_size is 13, but per_device_train_batch_size x "),
        (own(13, 3, 4), {}, r" x gradient_accumulation_steps x ranks is 12; "),
        (own(12, 6, 2), {}, "train_micro_batch_size_per_gpu is 6, but per_device_train_batch_size"),
        (own(12, 3, 2), {}, "gradient_accumulation_steps is 2, but gradient_accumulation_steps is"),
        (own(12, 3, 4, gradient_clipping=0.5), {}, "gradient_clipping is 0.5, but max_grad_norm"),
        (own(12, 3, 4, bf16={"enabled": True}), {}, "bf16.enabled is True, but bf16 is False"),
        (
            own(12, 3, 4, optimizer={"type": "AdamW", "params": {"lr": 1e-3}}),
            {"learning_rate": 2e-3},
            "optimizer.params.lr is 0.001, but learning_rate is 0.002",
        ),
    ],
)
def test_a_contradiction_is_refused_with_the_field_and_both_values(
    tmp_path, deepspeed, options, message
):
    with pytest.raises(ConfigError, match=message) as caught:
        config(tmp_path, deepspeed=deepspeed, **options)
    assert "\n" not in str(caught.value)


def test_a_contradiction_names_the_file(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps(own(99, "auto", "auto")))
    with pytest.raises(ConfigError, match=r"own\.json: train_batch_size is 99"):
        config(tmp_path, deepspeed=str(file))


def test_a_configuration_from_accelerate_is_treated_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    args = config(tmp_path)
    assert told(args) == (12, 3, 4)
    with one_item_per_step(args):
        assert told(args) == (12, 12, 1)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 2, but"):
        config(tmp_path)


def test_without_a_launcher_training_is_refused(tmp_path):
    from tests.support import make_trainer

    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 1"):
        make_trainer(tmp_path, options={"deepspeed": "zero2"})
