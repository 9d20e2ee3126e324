"""What TRL's options do to a run: nothing at all, or what they did in TRL."""

from __future__ import annotations

import torch
from transformers import get_scheduler

from dpofast.train.policy import resolve_ref_model
from tests.support import history, make_trainer, tiny_llama, train

WITHOUT_EFFECT = {
    "padding_free": True,
    "pad_to_multiple_of": 8,
    "use_logits_to_keep": True,
    "activation_offloading": True,
    "label_pad_token_id": -1,
    "padding_value": 7,
    "force_use_ref_model": True,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "f_alpha_divergence_coef": 0.9,
    "ref_model_sync_steps": 1,
    "remove_unused_columns": False,
    "use_cache": True,
    "torch_empty_cache_steps": 1,
    "average_tokens_across_devices": False,
}


def test_options_without_effect_leave_a_run_as_it_is_bit_for_bit(tmp_path):
    expected = make_trainer(tmp_path / "a", options={"max_steps": 2})
    got = make_trainer(tmp_path / "b", options={"max_steps": 2, **WITHOUT_EFFECT})
    assert train(got) == train(expected)
    for ours, theirs in zip(got.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [type(m) for m in got.model.modules()] == [type(m) for m in expected.model.modules()]


def test_warmup_ratio_gives_the_learning_rates_of_its_share_of_the_steps(tmp_path):
    options = {"max_steps": 6, "warmup_ratio": 0.4, "lr_scheduler_type": "linear"}
    trainer = make_trainer(tmp_path, options=options)
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=trainer.args.learning_rate)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=3, num_training_steps=6)
    expected = []
    for _ in range(6):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == expected


def test_no_epochs_with_a_number_of_steps_trains_those_steps(tmp_path):
    trainer = make_trainer(tmp_path, options={"num_train_epochs": 0, "max_steps": 2})
    trainer.train()
    assert trainer.state.global_step == len(history(trainer)) == 2


def test_a_reference_given_by_name_is_loaded_with_its_own_arguments(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")

    def dtype_of_reference(ref_model, **options):
        config = make_trainer(tmp_path, options=options).args
        model = resolve_ref_model(ref_model, name, config)
        return None if model is None else model.dtype

    own = {"ref_model_init_kwargs": {"torch_dtype": "bfloat16"}}
    policy = {"model_init_kwargs": {"dtype": "float64"}}
    assert dtype_of_reference(name, **own, **policy) == torch.bfloat16
    assert dtype_of_reference(name + "/", **policy) == torch.float64
    assert dtype_of_reference(name) is None, "the same model is the policy before step 1"
    assert dtype_of_reference(None, **own) is None
