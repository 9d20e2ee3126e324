"""The plot of a run."""

from __future__ import annotations

from dpofast.monitor.plots import plot_run


def test_training_and_evaluation_are_drawn_into_a_png(tmp_path):
    history = [
        {"step": 1, "loss": 0.69, "rewards/margins": 0.0, "rewards/accuracies": 0.0},
        {"step": 2, "loss": 0.5, "rewards/margins": 0.4, "logratios/chosen": 0.1},
        {"step": 2, "eval_loss": 0.6, "eval_rewards/accuracies": 0.75},
    ]
    plot_run(history, tmp_path / "run.png", "a run")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
