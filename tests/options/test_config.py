"""The options of a run: defaults, refusals, and the options of TRL and of the launchers."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import trl
from transformers import HfArgumentParser, TrainingArguments

from dpofast import DPOConfig
from dpofast.cli.run_options import read_options
from dpofast.errors import ConfigError
from dpofast.options.checkpointing import NAMES, chooses_layers
from dpofast.options.trl import resolve_config, resolve_tokenizer
from dpofast_kernels import LOSS_OPTIONS, LOSSES, make_coupled_loss, make_loss, make_mixture

# The names of gradient_checkpointing in this version of transformers.
CHECKPOINTING = [name for name in NAMES if name in {item.name for item in fields(DPOConfig)}]


def config(tmp_path, **options):
    return DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **options)


def test_defaults_are_trls(tmp_path):
    ours = config(tmp_path)
    theirs = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    for name in (
        "beta",
        "loss_type",
        "label_smoothing",
        "discopop_tau",
        "max_length",
        "truncation_mode",
        "learning_rate",
        "logging_steps",
        "bf16",
        "disable_dropout",
        "lr_scheduler_type",
        "per_device_train_batch_size",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"beta": [0.1]}, "beta"),
        ({"beta": "0.1"}, "beta"),
        ({"label_smoothing": "x"}, "label_smoothing"),
        ({"loss_type": None}, "loss_type"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"num_train_epochs": -1}, "num_train_epochs"),
        ({"num_train_epochs": 0}, "num_train_epochs: got 0, with max_steps -1"),
        ({"max_steps": 0}, "nothing would be trained"),
        ({"warmup_ratio": 1.5}, "warmup_ratio: got 1.5, expected a number from 0 to 1"),
        ({"rank_timeout": -1}, "rank_timeout: got -1, expected a number of seconds"),
        ({"rank_timeout": math.inf}, "rank_timeout: got inf, expected a number of seconds"),
        ({"learning_rate": math.nan}, "learning_rate: got nan, expected a number at least 0"),
        ({"trust_checkpoint": "false"}, "trust_checkpoint: got 'false', expected true or false"),
        ({"overwrite_output_dir": "no"}, "overwrite_output_dir: got 'no', expected true or false"),
        ({"warmup_ratio": 0.1, "optim": "schedule_free_adamw"}, "set warmup_steps"),
        ({"label_smoothing_factor": 0.3}, "set label_smoothing"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"model_init_kwargs": "{"}, "model_init_kwargs"),
        ({"beta": float("nan")}, "beta"),
        ({"loss_type": "sigmod"}, "sigmoid"),
        ({"loss_type": []}, "loss_type: got \\[\\], expected a name or a list of names"),
        (
            {"loss_type": ["sigmoid", "hing"]},
            "Unknown loss 'hing'. Did you mean 'hinge'",
        ),
        (
            {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]},
            "loss_weights: got 1 weights for the 2 losses of loss_type, sigmoid, hinge; give one",
        ),
        ({"loss_weights": [-1.0]}, "loss_weights: got .* finite numbers of at least 0, not all 0"),
        ({"loss_weights": [0.0]}, "loss_weights: got .* finite numbers of at least 0, not all 0"),
        ({"loss_type": [["sigmoid"]]}, "loss_type: Unknown loss"),
        ({"f_alpha_divergence_coef": "x"}, "f_alpha_divergence_coef: got 'x', expected a finite"),
        ({"f_alpha_divergence_coef": math.inf}, "f_alpha_divergence_coef: got inf, expected"),
        ({"loss_weights": 0.5}, "loss_weights: got 0.5, expected a list of numbers"),
        ({"loss_weights": ["half"]}, "loss_weights: got \\['half'\\], expected a list of numbers"),
        ({"loss_type": ["hinge", "ipo"], "label_smoothing": 0.1}, "label_smoothing"),
        ({"f_divergence_type": "kl"}, "f_divergence_type: Unknown divergence 'kl'; there are"),
        (
            {"f_divergence_type": "forward_kl", "loss_type": ["sigmoid", "apo_zero"]},
            "f_divergence_type: The apo_zero loss has no other divergence",
        ),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing"),
        ({"loss_type": ["kto", "sft"]}, "loss_type: kto can't be mixed with other losses"),
        ({"loss_type": "kto", "label_smoothing": 0.1}, "label_smoothing is 0.1, but the kto loss"),
        ({"loss_type": "kto", "desirable_weight": -1}, "desirable_weight is -1, expected a finite"),
        ({"loss_type": "dpo"}, "loss_type: Unknown loss 'dpo'. Did you mean 'sigmoid'"),
        ({"loss_type": "exo_pair"}, "label_smoothing is 0.0, .* set it to 1e-3"),
        ({"discopop_tau": 2.0, "loss_type": "discopop"}, "discopop_tau is 2.0, .* at most 1"),
        ({"discopop_tau": "x", "loss_type": "discopop"}, "discopop_tau is 'x', expected a number"),
        ({"dpop_lambda": -1.0, "loss_type": "dpop"}, "dpop_lambda is -1.0, expected"),
        ({"answer_pairs": "best"}, "answer_pairs: got 'best', .* all, best_worst, adjacent, given"),
        ({"answer_pairs": "all", "loss_type": "kto"}, "answer_pairs: the kto loss takes answers"),
        ({"beta_schedule": "exp"}, "beta_schedule: got 'exp', .* constant, linear, cosine"),
        ({"beta_schedule": "linear"}, "beta_schedule: linear needs .*; set beta_end"),
        ({"beta_schedule": "cosine", "beta_end": 0.0}, "beta_end: got 0.0, .* above 0"),
        ({"beta_schedule": "cosine", "beta_end": float("inf")}, "beta_end: got inf"),
        ({"beta_end": "x"}, "beta_end: got 'x'"),
        ({"target_kl": 0.0}, "target_kl: got 0.0, expected a number above 0"),
        ({"target_kl": True}, "target_kl: got True"),
        ({"target_kl": 0.1, "target_kl_gain": 1.5}, "target_kl_gain: got 1.5, .* at most 1"),
        ({"target_kl": 0.1, "target_kl_gain": None}, "target_kl_gain: got None"),
        ({"target_kl": 0.1, "beta_min": -1.0}, "beta_min: got -1.0"),
        ({"target_kl": 0.1, "beta_min": 0.2}, "beta: got 0.1, .*between beta_min, 0.2, and .* 1"),
        ({"target_kl": 0.1, "beta_max": 0.05}, "beta: got 0.1, .*beta_max, 0.05"),
        (
            {"target_kl": 0.1, "beta_schedule": "linear", "beta_end": 0.2},
            "target_kl: beta_schedule is 'linear', too, .* leave one out",
        ),
        ({"ld_alpha": 0.5, "loss_type": "simpo"}, "ld_alpha is 0.5, but it discounts log-ratios"),
        ({"target_kl": 0.5, "loss_type": "sft"}, "target_kl is 0.5, but the loss sft has no refer"),
        ({"ld_alpha": 1.1}, "ld_alpha: got 1.1, expected a number from 0 to 1"),
        ({"ld_alpha": -0.1}, "ld_alpha: got -0.1, expected a number from 0 to 1"),
        ({"ld_alpha": math.nan}, "ld_alpha: got nan, expected a number from 0 to 1"),
        ({"ld_alpha": "0.5"}, "ld_alpha: got '0.5', expected a number from 0 to 1"),
        ({"ld_alpha": True}, "ld_alpha: got True, expected a number from 0 to 1"),
        (
            {"ld_alpha": 0.5, "reference_store_detail": "sums"},
            "reference_store_detail: got 'sums', but ld_alpha=0.5 needs .* set it to 'logps'",
        ),
        ({"max_length": 1}, "max_length"),
        ({"truncation_mode": "keep_middle"}, "keep_start"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"bf16_full_eval": True}, "bf16_full_eval"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"group_by_prompt": "no"}, "group_by_prompt: got 'no', expected true or false"),
        ({"group_by_prompt": True, "loss_type": "kto"}, "group_by_prompt: the kto loss takes answ"),
        ({"lerning_rate": 1e-5}, "did you mean 'learning_rate'"),
        ({"max_prompt_length": 0}, "max_prompt_length: got 0, expected a whole number >= 1"),
        ({"max_completion_length": 1.5}, "max_completion_length: got 1.5"),
        ({"max_target_length": "8"}, "max_target_length: got '8'"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"torch_compile": True}, "rows differ in every step"),
        ({"torch_compile_mode": "max-autotune"}, "torch_compile_mode isn't supported"),
        ({"fsdp": "full_shard"}, "zero2 or zero3"),
        ({"deepspeed": "zero_3"}, "did you mean 'zero3'"),
        ({"fp16": True}, "fp16: a CPU would compute in float32 all the same"),
        ({"adam_beta1": 1.0}, "adam_beta1: got 1.0, expected a number from 0 to below 1"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1, expected a number at least 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers: got -1"),
        ({"log_level": "loud"}, "log_level: got 'loud', expected one of"),
        ({"seed": 2**32}, "seed: got 4294967296, expected at most 4294967295"),
        ({"optim_args": "fused"}, "optim_args: got 'fused', expected `name=value`"),
        ({"lr_scheduler_kwargs": "min_lr"}, "lr_scheduler_kwargs: got 'min_lr', expected a map"),
        (
            {"gradient_checkpointing_kwargs": {"use_rentrant": False}},
            "_checkpointing_kwargs: there is no 'use_rentrant' in it; did you mean 'use_reentrant'",
        ),
        ({"gradient_checkpointing_kwargs": 3}, "_checkpointing_kwargs: got 3, expected a mapping"),
        ({"accelerator_config": {"split_batchs": 1}}, "accelerator_config: .*'split_batches'"),
        ({"accelerator_config": "no.json"}, "accelerator_config: 'no.json' can't be read .No such"),
    ],
)
def test_a_wrong_value_or_name_is_refused_with_the_option(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **options)


def test_fsdp_that_the_launcher_brings_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="--use_deepspeed"):
        config(tmp_path)


def test_compiling_that_the_launcher_brings_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ConfigError, match="--dynamo_backend"):
        config(tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    config(tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"), [((), "auto"), (("auto",), "auto"), (("",), True), (("false",), False)]
)
def test_a_command_line_says_whether_layers_recompute(tmp_path, given, expected):
    parser = HfArgumentParser(DPOConfig)
    for name in CHECKPOINTING:
        arguments = ["--output_dir", str(tmp_path), "--use_cpu"]
        if given:
            arguments += [f"--{name}", *filter(None, given)]
        (options,) = parser.parse_args_into_dataclasses(arguments)
        assert options.gradient_checkpointing == getattr(options, name) == expected
        assert read_options(None, arguments).config.gradient_checkpointing == expected


@pytest.mark.parametrize("value", [True, False])
def test_checkpointing_can_be_changed_in_a_config(tmp_path, value):
    for name in CHECKPOINTING:
        changed, usual = replace(config(tmp_path), **{name: value}), config(tmp_path)
        setattr(usual, name, value)
        usual.check_again()
        for options in (changed, usual):
            assert not chooses_layers(options)
            assert {getattr(options, each) for each in CHECKPOINTING} == {value}


def test_another_word_for_checkpointing_is_refused_with_those_there_are():
    for name in CHECKPOINTING:
        with pytest.raises(ConfigError, match=f"{name}: got 'atuo', expected .*true, false, auto"):
            read_options(None, [f"--{name}", "atuo"])


@pytest.mark.parametrize("value", ["auto", True, False])
def test_both_names_of_checkpointing_are_taken_without_a_warning(tmp_path, value, recwarn):
    for name in CHECKPOINTING:
        options = config(tmp_path, **{name: value})
        assert options.gradient_checkpointing == value
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]


def test_the_old_name_of_dtype_is_taken(tmp_path):
    options = config(tmp_path, model_init_kwargs='{"torch_dtype": "bfloat16"}')
    assert options.loading_options() == {"dtype": "bfloat16", "trust_remote_code": False}


def test_hugging_faces_argument_parser_takes_it(tmp_path):
    parser = HfArgumentParser(DPOConfig)
    (parsed,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--beta", "0.3", "--loss_type", "ipo", "--use_cpu", "True"]
    )
    assert parsed.beta == 0.3
    assert parsed.loss_type == ["ipo"]


class TestResolveConfig:
    def test_without_args_the_folder_is_named_after_the_model(self):
        assert resolve_config(None, {}, "org/model").output_dir == "model-DPO"

    def test_trls_own_config_is_taken(self, tmp_path):
        theirs = trl.DPOConfig(output_dir=str(tmp_path), beta=0.3, use_cpu=True, max_length=77)
        ours = resolve_config(theirs, {}, "model")
        assert isinstance(ours, DPOConfig)
        assert (ours.beta, ours.max_length, ours.output_dir) == (0.3, 77, str(tmp_path))

    def test_the_old_style_merges_the_trainers_arguments(self, tmp_path):
        plain = TrainingArguments(output_dir=str(tmp_path), learning_rate=3e-6, use_cpu=True)
        options = {"beta": 0.2, "max_length": 64, "loss_type": "hinge", "label_pad_token_id": -100}
        ours = resolve_config(plain, options, "model")
        assert (ours.beta, ours.max_length, ours.loss_type) == (0.2, 64, ["hinge"])
        assert ours.learning_rate == 3e-6

    def test_options_beside_our_config_win(self, tmp_path):
        assert resolve_config(config(tmp_path), {"beta": 0.7}, "model").beta == 0.7

    def test_unknown_options_and_types_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="did you mean 'beta'"):
            resolve_config(None, {"betta": 0.1}, "model")
        with pytest.raises(ConfigError, match="DPOConfig"):
            resolve_config({"beta": 0.1}, {}, "model")


def test_the_tokenizers_old_name_is_taken_unless_the_new_one_says_something_else():
    options = {"tokenizer": "old", "beta": 0.1}
    assert resolve_tokenizer(None, options) == "old"
    assert options == {"beta": 0.1}
    assert resolve_tokenizer("same", {"tokenizer": "same"}) == "same"
    with pytest.raises(ConfigError, match="only one of them"):
        resolve_tokenizer("new", {"tokenizer": "old"})


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_made_with_its_options(tmp_path, name):
    options = {"exo_pair": {"label_smoothing": 0.2}, "discopop": {"discopop_tau": 0.1}}
    options |= {"dpop": {"dpop_lambda": 7}}
    given = {"beta": 0.3, **options.get(name, {})}
    assert config(tmp_path, loss_type=name, **given).make_loss() == make_loss(name, **given)


@pytest.mark.parametrize("names", ["aot", ["aot_unpaired"], ["hinge", "aot"]])
def test_losses_that_couple_pairs_are_made_with_their_options(tmp_path, names):
    given = {"beta": 0.3, "label_smoothing": 0.1}
    expected = make_coupled_loss(names, [0.5] * len(names) if len(names) == 2 else None, **given)
    weights = {"loss_weights": [0.5, 0.5]} if len(names) == 2 else {}
    assert config(tmp_path, loss_type=names, **weights, **given).make_loss() == expected


def test_losses_are_mixed_and_scored_as_the_options_say(tmp_path):
    given = {"beta": 0.3, "label_smoothing": 0.1, "dpop_lambda": 3.0}
    names, weights = ["sigmoid", "dpop"], [0.8, 0.2]
    options = {"loss_type": names, "loss_weights": weights, **given}
    mixture = make_mixture(names, weights, **given)
    assert config(tmp_path, **options).make_loss() == mixture
    assert config(tmp_path, loss_type=["ipo"], loss_weights=[1]).make_loss() == make_loss("ipo")
    options |= {"loss_type": ["sigmoid", "hinge"], "f_divergence_type": "alpha_divergence"}
    made = config(tmp_path, **options, f_alpha_divergence_coef=0.3).make_loss()
    assert (made.divergence, made.coefficient, made.beta) == ("alpha_divergence", 0.3, 0.3)
    assert made.loss == make_mixture(["sigmoid", "hinge"], weights, 0.3, 0.1)


def test_options_of_another_loss_have_no_effect_and_are_said(tmp_path, caplog):
    config(tmp_path, discopop_tau=0.1, dpop_lambda=5.0, loss_type="dpop")
    assert "discopop_tau=0.1 (only the loss discopop has it)" in caplog.text
    assert "dpop_lambda" not in caplog.text
    config(tmp_path, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    assert "it is reverse_kl; in older versions of TRL it was forward_kl" in caplog.text
    config(tmp_path, f_alpha_divergence_coef=0.9)
    assert "f_alpha_divergence_coef=0.9 (only alpha_divergence has it)" in caplog.text


def test_what_would_move_beta_without_a_schedule_or_a_target_is_said(tmp_path, caplog):
    config(tmp_path, beta_end=0.5, beta_min=0.01, target_kl_gain=0.2)
    assert "beta_end=0.5 (only linear and cosine have it)" in caplog.text
    assert "beta_min=0.01 (only target_kl has it)" in caplog.text
    assert "target_kl_gain=0.2 (only target_kl has it)" in caplog.text
    caplog.clear()
    config(tmp_path, target_kl=0.1, target_kl_gain=0.2, beta_max=3.0)
    config(tmp_path, beta_schedule="linear", beta_end=0.5)
    assert not caplog.text


def test_options_of_single_losses_have_the_losses_own_defaults(tmp_path):
    ours = config(tmp_path)
    for option, names in LOSS_OPTIONS.items():
        for name in names:
            assert getattr(ours, option) == getattr(make_loss(name), option)
