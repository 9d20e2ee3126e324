"""What may differ between a checkpoint and the run that resumes from it."""

from __future__ import annotations

import pytest

from dpofast.errors import DifferentRunError
from dpofast.options.allowed_changes import read_allowed
from dpofast.train.checkpoint.same_run import compare

FACTS = {
    "beta": 0.1,
    "bf16": False,
    "data": "a1",
    "deepspeed": None,
    "deepspeed_scheduler": None,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "max_length": 512,
    "max_steps": None,
    "num_steps": 30,
    "num_train_epochs": 3,
    "pairs_per_step": 4,
    "per_device_train_batch_size": 2,
    "ranks": 2,
    "warmup": 3,
    "warmup_ratio": 0.1,
    "warmup_steps": 0,
    "config.rope_theta": 1e4,
}


def compared(allowed=(), convert=None, **changed):
    now = {**FACTS, **{name.replace("__", "."): value for name, value in changed.items()}}
    return compare(FACTS, now, read_allowed(list(allowed)), "run/checkpoint-4", convert)


def refused(allowed=(), convert=None, **changed):
    with pytest.raises(DifferentRunError) as caught:
        compared(allowed, convert, **changed)
    return str(caught.value)


def test_all_differences_are_listed_with_both_values_and_the_remedies():
    message = refused(beta=0.2, learning_rate=2e-3, bf16=True)
    assert message == (
        "'run/checkpoint-4' belongs to a run that differs from this one:\n"
        "  beta: 0.1 in the checkpoint, 0.2 now\n"
        "  bf16: False in the checkpoint, True now; this can't change, as the reference log-probs "
        "were computed in it\n"
        "  learning_rate: 0.001 in the checkpoint, 0.002 now\n"
        "Set back what differs, or let it change by allow_changed: [beta, learning_rate], or start "
        "a new run from these weights: give the checkpoint as model_name_or_path, and leave "
        "resume_from_checkpoint out."
    )


def test_allowed_changes_are_reported_and_the_others_refused():
    changes = compared(["beta", "data"], beta=0.2, ranks=1, per_device_train_batch_size=4)
    assert [change.name for change in changes.allowed] == ["beta"]
    assert [change.name for change in changes.harmless] == ["per_device_train_batch_size", "ranks"]
    message = refused(["beta"], beta=0.2, pairs_per_step=8)
    assert "pairs_per_step: 4" in message
    assert "beta" not in message


def test_checkpoints_from_before_there_were_other_options_are_compared_with_what_these_did():
    before = {**FACTS, "loss_type": "sigmoid"}
    own = {"f_divergence_type": "reverse_kl", "loss_weights": None, "dpop_lambda": None}
    own |= {"ld_alpha": None, "group_by_prompt": False}
    unchanged = compare(before, {**before, **own}, frozenset(), "run/checkpoint-4", None)
    assert (unchanged.allowed, unchanged.harmless) == ((), ())
    now = {**before, **own, "f_divergence_type": "js_divergence", "loss_weights": [3.0]}
    now |= {"ld_alpha": 0.5, "group_by_prompt": True}
    with pytest.raises(
        DifferentRunError,
        match=r"f_divergence_type: reverse_kl in the .*\n.*3\.0.*\n  ld_alpha: .*\n"
        r"  group_by_prompt: False in the ",
    ):
        compare(before, now, frozenset(), "run/checkpoint-4", None)


def test_limits_of_length_only_count_if_they_change_the_data():
    assert compared(max_length=1024).allowed == ()
    message = refused(max_length=256, data="b2")
    assert "allow_changed: [data, max_length]" in message


def test_the_same_number_of_steps_by_another_option_is_no_difference():
    assert compared(max_steps=30, num_train_epochs=None).harmless == ()
    assert compared(warmup_steps=3, warmup_ratio=None).harmless == ()
    assert "num_train_epochs: 3" in refused(num_train_epochs=4, num_steps=40)


@pytest.mark.parametrize(
    ("schedule", "warmup", "is_harmless"),
    [("constant", 4, True), ("constant_with_warmup", 3, True), ("constant_with_warmup", 4, False)],
)
def test_a_longer_run_is_harmless_where_the_schedule_does_not_depend_on_it(
    schedule, warmup, is_harmless
):
    before = {**FACTS, "lr_scheduler_type": schedule}
    now = {**before, "num_train_epochs": 4, "num_steps": 40, "warmup": warmup}
    if is_harmless:
        (change,) = compare(before, now, (), "c", None).harmless
        assert change.name == "num_train_epochs"
    else:
        with pytest.raises(DifferentRunError, match="num_train_epochs"):
            compare(before, now, (), "c", None)


def test_a_longer_run_with_a_beta_that_moves_is_refused():
    """The beta of a step depends on the length, whatever the learning rate does."""
    facts = {**FACTS, "lr_scheduler_type": "constant", "beta_schedule": "linear", "max_steps": 4}
    longer = {**facts, "max_steps": 8, "num_steps": 8}
    with pytest.raises(DifferentRunError, match="max_steps: 4 in the checkpoint, 8 now"):
        compare({**facts, "num_steps": 4}, longer, frozenset(), "c", None)


def test_schedules_that_follow_from_the_run_cannot_change():
    before = {**FACTS, "lr_scheduler_type": "reduce_lr_on_plateau"}
    with pytest.raises(DifferentRunError, match="this can't change, as the schedule reduce_lr"):
        compare(before, {**before, "learning_rate": 1.0}, {"learning_rate"}, "c", None)
    before = {**FACTS, "deepspeed_scheduler": {"type": "WarmupLR"}}
    with pytest.raises(DifferentRunError, match="DeepSpeed makes the schedule"):
        compare(before, {**before, "learning_rate": 1.0}, {"learning_rate"}, "c", None)


def test_other_ranks_are_refused_with_the_command_that_converts():
    assert compared(ranks=1, deepspeed=None).harmless[0].name == "ranks"
    message = refused(convert="python -m convert", ranks=1)
    assert "first convert the states of the optimizer: python -m convert" in message


def test_another_stage_is_named():
    assert "deepspeed: none in the checkpoint, zero2 now; this can't change" in refused(
        convert="python -m convert", ranks=1, deepspeed="zero2"
    )


def test_facts_of_a_group_that_only_one_side_has_are_differences():
    assert "config.softcap: none in the checkpoint, 30 now" in refused(config__softcap=30)
    assert compared(brand_new=1).unknown == ("brand_new",)
    # A newer transformers knows more options, which an old checkpoint can't have.
    assert compared(config__softcap=30, versions="transformers 6").unknown == (
        "config.softcap",
        "versions",
    )
    assert "adapter.r: none in the checkpoint" in refused(adapter__r=8, versions="peft 1")
