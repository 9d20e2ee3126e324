"""What scripts read from TRL's trainer is there, and can't be assigned in vain."""

from __future__ import annotations

import pytest
from peft import LoraConfig

from dpofast import DPOTrainer
from dpofast.errors import ConfigError
from tests.support import BETA, make_trainer, tiny_llama, tiny_mixtral


def test_settings_show_what_the_trainer_uses(tmp_path):
    options = {"loss_type": "sigmoid", "label_smoothing": 0.2, "max_length": 99}
    options |= {"max_prompt_length": 50, "max_target_length": 40, "ld_alpha": 0.5}
    reference = tiny_llama(seed=1)
    trainer = make_trainer(tmp_path, options=options, ref_model=reference)
    assert trainer.beta == BETA
    assert (trainer.label_smoothing, trainer.ld_alpha) == (0.2, 0.5)
    assert trainer.loss_types == trainer.loss_type == ["sigmoid"]
    assert trainer.ref_model is reference
    assert (trainer.max_length, trainer.max_prompt_length) == (99, 50)
    assert trainer.max_completion_length == 40
    assert trainer.truncation_mode == "keep_start"
    assert trainer.precompute_ref_log_probs is trainer.precompute_ref_logps is True
    assert (trainer.aux_loss_enabled, trainer.aux_loss_coef) == (False, 0.0)
    assert trainer.is_peft_model is False
    assert trainer.loss_fn is trainer.metrics_fn is None


def test_settings_of_a_mixture_of_losses(tmp_path):
    names, weights = ["sigmoid", "ipo"], [0.8, 0.2]
    options = {"loss_type": names, "loss_weights": weights, "label_smoothing": 0.1}
    trainer = make_trainer(tmp_path, options=options)
    assert trainer.loss_types == trainer.loss_type == names
    assert trainer.loss_weights == weights
    assert (trainer.beta, trainer.label_smoothing) == (BETA, 0.1)
    assert (trainer.f_divergence_type, trainer.f_alpha_divergence_coef) == ("reverse_kl", 0.5)
    trainer.loss_weights = trainer.args.loss_weights  # as scripts for TRL do
    options |= {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}
    trainer = make_trainer(tmp_path, options=options)
    assert (trainer.loss_types, trainer.loss_weights) == (names, weights)
    assert (trainer.beta, trainer.label_smoothing) == (BETA, 0.1)
    assert trainer.f_divergence_type == "alpha_divergence"
    assert trainer.f_alpha_divergence_coef == 0.3


def test_settings_of_a_mixture_and_of_an_adapter(tmp_path):
    mixture = make_trainer(tmp_path, tiny_mixtral(), options={"router_aux_loss_coef": 0.3})
    assert mixture.aux_loss_enabled
    assert mixture.aux_loss_coef == mixture.router_aux_loss_coef == 0.3
    assert mixture.ref_model is None
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert make_trainer(tmp_path, peft_config=config).is_peft_model


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("beta", "trainer.pair_loss"),
        ("ref_model", "pass it to DPOTrainer"),
        ("loss_fn", "pass it to DPOTrainer"),
        ("metrics_fn", "pass it to DPOTrainer"),
        ("loss_type", "DPOConfig"),
        ("loss_weights", "make_mixture"),
        ("f_divergence_type", "DivergenceLoss"),
        ("f_alpha_divergence_coef", "DivergenceLoss"),
        ("ld_alpha", "DPOConfig"),
        ("use_weighting", "DPOConfig"),
    ],
)
def test_an_assignment_that_would_change_nothing_is_refused(tmp_path, name, remedy):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigError, match=rf"DPOTrainer\.{name} can't be assigned.*{remedy}"):
        setattr(trainer, name, 0.7)

    class Own(DPOTrainer):
        def __init__(self, *args, **kwargs):
            setattr(self, name, 0.7)
            super().__init__(*args, **kwargs)

    with pytest.raises(ConfigError, match=rf"Own\.{name} can't be assigned"):
        Own("no such model")


def test_assigning_what_it_is_changes_nothing_and_is_no_error(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.beta = trainer.args.beta
    trainer.ref_model = None
    assert trainer.beta == BETA
