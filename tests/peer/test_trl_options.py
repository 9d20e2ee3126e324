"""Every option of TRL's DPOConfig: compared, taken without effect, or refused; none is unknown."""

from __future__ import annotations

import logging
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from dpofast import DPOConfig
from dpofast.errors import ConfigError
from dpofast.options.trl_fields import RULES, NoEffect
from dpofast.options.unsupported import UNUSED

trl = pytest.importorskip("trl", reason="needs the extra `bench`")

pytestmark = pytest.mark.peer

ROOT = Path(__file__).parents[2]
INHERITED = {item.name: item for item in fields(TrainingArguments)}
THEIRS = {item.name: item for item in fields(trl.DPOConfig)}
OURS = {item.name: item for item in fields(DPOConfig)}

# The test that holds the meaning of each option that isn't transformers' own, or whose default
# differs from that of transformers.
RACE = "tests/peer/test_trl.py::test_losses_gradient_norms_and_rewards_are_trls"
LOSSES_RACE = RACE.replace("test_trl.py", "test_trl_losses.py")
COMPARED = {
    **dict.fromkeys(("beta", "learning_rate", "bf16", "logging_steps"), RACE),
    **dict.fromkeys(("loss_type", "loss_weights", "discopop_tau"), LOSSES_RACE),
    **dict.fromkeys(("f_divergence_type", "f_alpha_divergence_coef", "ld_alpha"), LOSSES_RACE),
    "use_weighting": LOSSES_RACE,
    "gradient_checkpointing": "tests/model/test_packable.py::test_gradient_checkpointing",
    "label_smoothing": "tests/train/test_trainer.py::test_label_smoothing_is_conservative_dpo",
    "max_length": "tests/data/test_peer_trl.py::test_what_is_kept_under_a_limit_is_what_trl_keeps",
    "truncation_mode": (
        "tests/data/test_peer_trl.py::test_what_is_kept_under_a_limit_is_what_trl_keeps"
    ),
    "disable_dropout": (
        "tests/train/test_trainer.py::test_dropout_is_switched_off_and_the_config_keeps_it"
    ),
    "router_aux_loss_coef": (
        "tests/peer/test_trl_router.py::test_losses_gradients_and_evaluation_are_trls"
    ),
    "precompute_ref_log_probs": (
        "tests/train/test_trainer.py::test_without_precompute_nothing_is_kept_and_the_numbers_are_"
        "the_same"
    ),
    "precompute_ref_batch_size": (
        "tests/train/steps/test_loaders.py::"
        "test_references_are_scored_in_rows_as_long_as_training_takes_them"
    ),
    "dataset_num_proc": "tests/data/tokens/test_tokenize.py::test_processes_change_nothing",
    "pad_token": "tests/train/saving/test_checks.py::test_both_remedies_work",
    "model_init_kwargs": "tests/options/test_config.py::test_the_old_name_of_dtype_is_taken",
    "trust_remote_code": "tests/options/test_config.py::test_the_old_name_of_dtype_is_taken",
}
# docs/configuration.md and docs/from-trl.md name these.
OTHER_DEFAULTS = {
    *("precompute_ref_log_probs", "logging_nan_inf_filter", "report_to"),
    "gradient_checkpointing",
}
# Options of transformers that are refused, with a value.
REFUSED = {
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "parallelism_config": object(),
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "fsdp": "full_shard",
    "auto_find_batch_size": True,
    "fp16_full_eval": True,
    "bf16_full_eval": True,
}


def default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def other_value(name: str) -> Any:
    """A value that isn't the default."""
    usual = default(THEIRS[name])
    if isinstance(usual, bool):
        return not usual
    if isinstance(usual, int | float):
        return usual / 2
    return {
        "loss_weights": [0.5],
        "f_divergence_type": "js_divergence",
        "ld_alpha": 0.5,
        "label_names": ["labels"],
        "include_for_metrics": ["loss"],
        "liger_kernel_config": {"rope": False},
        "dataloader_multiprocessing_context": "spawn",
        "length_column_name": "len",
    }.get(name, 8)


def config(folder: Path, **options: Any) -> DPOConfig:
    return DPOConfig(str(folder), use_cpu=True, **{"report_to": [], **options})


def test_no_option_of_trl_is_unknown_and_every_meaning_has_a_test() -> None:
    assert not set(THEIRS) - set(OURS)
    changed = {
        name
        for name, item in THEIRS.items()
        if name not in INHERITED or default(item) != default(INHERITED[name])
    }
    assert changed - set(RULES) - set(UNUSED) == set(COMPARED)
    for place in COMPARED.values():
        path, _, name = place.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), place


def test_defaults_are_trls() -> None:
    differing = {name for name in THEIRS if default(THEIRS[name]) != default(OURS[name])}
    assert differing == OTHER_DEFAULTS


@pytest.mark.parametrize("name", sorted(set(THEIRS) & (set(RULES) | set(UNUSED))))
def test_what_isnt_compared_is_taken_with_a_line_or_refused_with_a_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    value = other_value(name)
    rule = RULES.get(name)
    if rule is None or isinstance(rule, NoEffect):
        with caplog.at_level(logging.WARNING, "dpofast"):
            config(tmp_path, **{name: value})
        (line,) = [r.getMessage() for r in caplog.records if "no effect" in r.getMessage()]
        assert line.startswith(f"These options have no effect: {name}={value!r} (")
    else:
        with pytest.raises(ConfigError, match=f"^{name}=.* isn't supported: "):
            config(tmp_path, **{name: value})


@pytest.mark.parametrize("name", REFUSED)
def test_options_of_transformers_that_cant_be_honoured_are_refused(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match=name):
        config(tmp_path, **{name: REFUSED[name]})
