"""A method that a script overrides is called, or named when the trainer is made."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import transformers

from dpofast import DPOTrainer
from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig
from dpofast.train.hooks.overrides import (
    HIDDEN_METHODS,
    IGNORED_ATTRIBUTES,
    IGNORED_HOOKS,
    TRL_ATTRIBUTES,
    check_overrides,
    override_of,
)
from tests.support import make_trainer, token_pairs

# Methods of TRL's DPOTrainer, by release.
TRL_METHODS = {
    "0.9.6": """_prepare_deepspeed get_train_dataloader get_eval_dataloader build_tokenized_answer
        tokenize_row null_ref_context compute_reference_log_probs concatenated_inputs dpo_loss
        get_batch_logps concatenated_forward get_batch_loss_metrics compute_loss get_batch_samples
        prediction_step store_metrics evaluation_loop log push_to_hub""",
    "0.24": """_prepare_peft_model _prepare_gradient_checkpointing _prepare_dataset tokenize_row
        process_row _set_signature_columns_if_needed get_train_dataloader get_eval_dataloader
        null_ref_context compute_ref_log_probs concatenated_inputs dpo_loss _compute_loss_liger
        concatenated_forward get_batch_loss_metrics compute_loss generate_from_model_and_ref
        prediction_step store_metrics evaluation_loop log _save_checkpoint""",
    "0.29": """_prepare_dataset _set_signature_columns_if_needed _precompute_ref_logps
        _truncate_inputs compute_ref_log_probs _compute_loss_liger _compute_loss compute_loss
        training_step log prediction_step _save_checkpoint""",
    "1.16": """_prepare_dataset _set_signature_columns_if_needed _precompute_ref_logps
        compute_ref_log_probs _compute_loss evaluate compute_loss training_step log prediction_step
        _save_checkpoint""",
}
# Methods that are called while a run trains, evaluates, predicts and saves.
CALLED = """
    _build_accelerator_args _clip_grad_norm _determine_best_metric _evaluate
    _finalize_training _get_grad_norm _get_learning_rate _get_output_dir _init_training_state
    _inner_training_loop _maybe_log_save_evaluate _move_model_to_device _prepare_for_training
    _run_epoch _save _save_checkpoint _save_optimizer_and_scheduler _save_rng_state _save_scaler
    _track_num_input_tokens _validate_args _wrap_model compute_loss compute_loss_context_manager
    create_accelerator_and_postprocess create_optimizer create_scheduler evaluate evaluation_loop
    floating_point_ops get_batch_samples get_decay_parameter_names get_eval_dataloader
    get_test_dataloader get_total_train_batch_size get_train_dataloader is_world_process_zero log
    num_examples predict prediction_step save_model set_initial_training_values store_flos train
    training_step"""
# Methods that a script calls itself, or that transformers calls in runs of other kinds.
ELSEWHERE = """
    _defer_fsdp_gradient_reduction _finish_current_push _has_mixed_mesh_grads
    _issue_warnings_after_load _load_best_model _load_callback_state _load_from_checkpoint
    _load_optimizer_and_scheduler _load_rng_state _load_scaler _mixed_mesh_grad_norm
    _push_from_checkpoint _sync_replicated_trainable_parameters _update_auto_batch_size add_callback
    create_model_card create_optimizer_and_scheduler end get_cp_size get_learning_rates
    get_num_trainable_parameters get_optimizer_cls_and_kwargs get_optimizer_group get_sp_size
    get_tp_size hyperparameter_search
    init_hf_repo is_local_process_zero log_metrics metrics_format pop_callback push_to_hub
    remove_callback save_metrics save_state"""


def overriding(name):
    """A trainer class that overrides a method and hands its call on."""

    def override(self, *args, **kwargs):
        raise AssertionError(f"{name} was called")

    return type("Own", (DPOTrainer,), {name: override})


@pytest.mark.parametrize("name", IGNORED_HOOKS)
def test_an_override_that_would_be_ignored_is_refused_at_once(name):
    with pytest.raises(ConfigError, match=f"^Own.{name}: .*never calls or reads it: .+"):
        overriding(name)("no such model")


def test_overrides_are_found_wherever_they_are():
    class Mixin:
        def dpo_loss(self, *args):
            """TRL's method in another base class, where Python's order puts it last."""

    class Combined(DPOTrainer, Mixin):
        pass

    class Below(Combined):
        pass

    with pytest.raises(ConfigError, match=r"Mixin\.dpo_loss: .*loss_fn"):
        Below("no such model")
    assert override_of(object.__new__(DPOTrainer), "compute_loss") is None


def test_a_method_replaced_on_the_class_itself_is_refused(monkeypatch):
    monkeypatch.setattr(DPOTrainer, "_compute_loss", lambda *args: None, raising=False)
    with pytest.raises(ConfigError, match=r"^DPOTrainer\._compute_loss: "):
        DPOTrainer("no such model")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("hooks"), eval_dataset=token_pairs(3, seed=4))


@pytest.mark.parametrize("name", ["get_batch_loss_metrics", "_get_train_sampler"])
@pytest.mark.parametrize("call", ["train", "evaluate", "predict"])
def test_a_method_that_is_assigned_later_is_found(trainer, monkeypatch, name, call):
    monkeypatch.setitem(vars(trainer), name, lambda *args: None)
    arguments = [token_pairs(3)] if call == "predict" else []
    with pytest.raises(ConfigError, match=f"DPOTrainer.{name}, assigned to the trainer: "):
        getattr(trainer, call)(*arguments)


@pytest.mark.parametrize("name", IGNORED_ATTRIBUTES)
def test_an_attribute_that_would_be_ignored_is_found(trainer, monkeypatch, name):
    monkeypatch.setattr(trainer, name, lambda *args: None, raising=False)
    with pytest.raises(ConfigError, match=f"DPOTrainer: {name} isn't supported: "):
        trainer.train()


def test_a_collator_that_is_assigned_later_is_found(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "data_collator", lambda rows: rows)
    with pytest.raises(ConfigError, match="DPOTrainer: data_collator isn't supported"):
        trainer.train()


def test_arguments_of_transformers_trainer_say_where_to_go(tmp_path):
    with pytest.raises(ConfigError, match=r"compute_loss_func=.* isn't supported: .* loss_fn"):
        make_trainer(tmp_path, compute_loss_func=len)


def test_a_call_of_a_method_of_trl_says_where_to_go(trainer):
    with pytest.raises(ConfigError, match=r"DPOTrainer\.get_batch_loss_metrics: .* loss_fn"):
        trainer.get_batch_loss_metrics(None, None)
    assert not hasattr(trainer, "dpo_loss")
    with pytest.raises(AttributeError, match="'DPOTrainer' object has no attribute 'nothing'"):
        _ = trainer.nothing


def test_the_old_get_batch_samples_generates_and_is_refused():
    class Own(DPOTrainer):
        def get_batch_samples(self, model, batch):
            """TRL 0.9 generated samples here."""

    with pytest.raises(ConfigError, match=r"Own\.get_batch_samples: .*epoch_iterator"):
        Own("no such model")


def test_every_method_of_transformers_and_trl_is_called_or_refused():
    methods = {name for name, value in vars(transformers.Trainer).items() if callable(value)}
    methods = {name for name in methods if not name.startswith("__")}
    kept = {*CALLED.split(), *ELSEWHERE.split()}
    known = {*kept, *IGNORED_HOOKS}
    assert methods <= known
    for names in TRL_METHODS.values():
        assert set(names.split()) <= known
    assert not kept & IGNORED_HOOKS.keys()


def test_the_page_lists_every_method_that_is_refused():
    page = (Path(__file__).parents[3] / "docs" / "extending.md").read_text(encoding="utf-8")
    rows = page.partition("| method | instead |")[2]
    assert {*IGNORED_HOOKS, *IGNORED_ATTRIBUTES} <= set(re.findall(r"`(\w+)`", rows))


def test_what_is_called_is_called_as_an_override(tmp_path):
    """Every override records its call, and hands it on."""
    called = set()

    def recording(name):
        def override(self, *args, **kwargs):
            called.add(name)
            return getattr(super(own, self), name)(*args, **kwargs)

        return override

    names = [name for name in CALLED.split() if hasattr(transformers.Trainer, name)]
    own = type("Own", (DPOTrainer,), {name: recording(name) for name in names})
    options = {
        "max_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "metric_for_best_model": "loss",
    }
    sets = {"options": options, "eval_dataset": token_pairs(3, seed=4)}
    made = make_trainer(tmp_path, trainer_class=own, **sets)
    made.train()
    made.predict(token_pairs(3, seed=4))
    assert set(names) - called == set()


def test_every_remedy_is_a_clause():
    for remedy in (*IGNORED_HOOKS.values(), *IGNORED_ATTRIBUTES.values()):
        assert remedy[0].islower()
        assert not remedy.endswith(".")


def nothing(*args):
    """A function of the user's, whatever it is called."""


@pytest.mark.parametrize("name", [*HIDDEN_METHODS, "loss_fn", "metrics_fn"])
def test_a_method_with_the_name_of_an_attribute_is_refused(name):
    own = type("Own", (DPOTrainer,), {name: nothing})
    with pytest.raises(ConfigError, match=rf"^Own\.{name}: .*(DPOTrainer|leave it out)"):
        own("no such model")


@pytest.mark.parametrize("value", [0.3, property(lambda self: 0.3)], ids=["attribute", "property"])
@pytest.mark.parametrize("name", ["beta", "loss_type", "ref_model", "max_length"])
def test_a_setting_that_a_class_hides_is_refused(name, value):
    own = type("Own", (DPOTrainer,), {name: value})
    with pytest.raises(ConfigError, match=rf"^Own\.{name}: it would change nothing: "):
        own("no such model")


@pytest.mark.parametrize("name", TRL_ATTRIBUTES)
def test_an_attribute_that_chooses_a_loss_or_reference_in_trl_is_refused(trainer, name):
    for value in (None, getattr(DPOConfig, name)):
        setattr(trainer, name, value)
        check_overrides(trainer)
    setattr(trainer, name, True if getattr(DPOConfig, name) is False else 0.5)
    try:
        with pytest.raises(ConfigError, match=f"^DPOTrainer.{name}: .* isn't supported: "):
            trainer.train()
    finally:
        delattr(trainer, name)
    own = type("Own", (DPOTrainer,), {name: "other"})
    with pytest.raises(ConfigError, match=f"^DPOTrainer.{name}: 'other' isn't supported: "):
        own("no such model")


@pytest.mark.parametrize("kind", [DPOTrainer, transformers.Trainer])
def test_a_wrapped_replacement_of_a_method_is_found(trainer, monkeypatch, kind):
    """functools.wraps gives the function the module of the one that it replaces."""
    wrapped = functools.wraps(transformers.Trainer._get_train_sampler)(lambda self: None)
    monkeypatch.setattr(kind, "_get_train_sampler", wrapped, raising=False)
    with pytest.raises(ConfigError, match=rf"^{kind.__name__}\._get_train_sampler: "):
        trainer.train()


def test_what_overrides_for_trl_read_says_where_to_go(trainer):
    with pytest.raises(ConfigError, match=r"DPOTrainer\._metrics: .* metrics_fn"):
        trainer._metrics["train"]["own"].append(0.5)


def test_a_function_as_pair_loss_is_refused(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "pair_loss", nothing)
    with pytest.raises(ConfigError, match=r"^DPOTrainer\.pair_loss: got a function, .*make_custom"):
        trainer.train()
