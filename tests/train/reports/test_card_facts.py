"""What a run's card says of its loss."""

from __future__ import annotations

from huggingface_hub import ModelCard

from dpofast.monitor.card import CARD_FILE
from tests.support import make_trainer


def card_in(folder):
    return ModelCard.load(folder / CARD_FILE)


def test_the_option_of_a_single_loss_is_in_the_card_of_its_runs_only(tmp_path):
    for loss_type in ("sigmoid", "dpop"):
        make_trainer(tmp_path, options={"loss_type": loss_type}).create_model_card()
        text = card_in(tmp_path / "run").text
        assert f"| loss_type | {loss_type} |" in text
        assert ("| dpop_lambda | 50.0 |" in text) == (loss_type == "dpop")


def test_the_options_of_a_mixture_are_in_the_card_of_its_runs(tmp_path):
    options = {"loss_type": ["sigmoid", "discopop"], "loss_weights": [0.8, 0.2]}
    options |= {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}
    options |= {"ld_alpha": 0.5, "use_weighting": True, "weighting_clamp": 2.0}
    make_trainer(tmp_path, options=options).create_model_card()
    text = card_in(tmp_path / "run").text
    shown = {**options, "loss_type": "sigmoid, discopop", "discopop_tau": 0.05}
    for name, value in shown.items():
        assert f"| {name} | {value} |" in text
