"""The comparison of losses and betas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpofast.cli import main
from dpofast.demo import training
from dpofast.demo.compare import compare, measurements, run_recipe
from dpofast.demo.data import DemoData, DemoSize, make_data
from dpofast.demo.measure import PolicyScores
from dpofast.demo.run import run_demo
from dpofast.demo.training import Measured, Recipe, Start, make_recipes
from dpofast.demo.warmup import WarmupOptions, warm_up
from dpofast.errors import ConfigError, DPOFastError, ModelError, NonFiniteError
from dpofast.options.named_loss import LOSS_NAMES
from tests.cli.runs import error_of

PNG = b"\x89PNG"


def measured(logps: list[list[float]], reward_accuracy: float, exact: float) -> Measured:
    scores = PolicyScores(np.array(logps), np.array([True, False]))
    return Measured(reward_accuracy, scores, ["", ""], exact)


def start_in(folder: Path) -> Start:
    row: Any = {"prompt": [], "chosen": [], "rejected": []}
    before = measured([[-4.0, -3.0], [-6.0, -8.0]], reward_accuracy=0.0, exact=0.5)
    return Start(folder, 7, DemoData([], [], [row, row]), {}, [], before.policy.logps, before)


AFTER = measured([[-2.0, -9.0], [-5.0, -10.0]], reward_accuracy=1.0, exact=1.0)


def test_recipes_go_loss_by_loss() -> None:
    recipes = make_recipes(["ipo", "sigmoid"], [2.0, 0.5])
    assert [(recipe.loss_type, recipe.beta) for recipe in recipes] == [
        ("ipo", 2.0),
        ("ipo", 0.5),
        ("sigmoid", 2.0),
        ("sigmoid", 0.5),
    ]


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_every_loss_can_be_chosen(name: str) -> None:
    assert make_recipes([name], [1.0]) == [Recipe(name, 1.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loss_type sigmoid dpoo", "Unknown loss 'dpoo'"),
        ("--loss_type dpo", "Did you mean 'sigmoid'?"),
        ("--loss_type ipo hinge ipo", "loss_type: ipo occurs twice; name it once."),
        ("--beta 1 0", "beta is 0.0, expected a finite number above 0."),
        ("--beta -1", "beta: got -1.0, expected a number above 0."),
        ("--beta nan", "beta: got nan, expected a number above 0."),
        ("--beta 0.1 0.10", "beta: 0.1 occurs twice; name it once."),
    ],
)
def test_bad_options_end_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    folder = tmp_path / "demo"
    assert message in error_of(
        capsys, ["demo", f"--output_dir={folder}", "--seed=3", *arguments.split()]
    )
    assert not folder.exists()


def test_a_beta_must_be_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--beta", "much"])
    assert stop.value.code == 2
    assert "invalid float value: 'much'" in capsys.readouterr().err


def test_one_recipe_is_the_demo_and_several_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    monkeypatch.setattr("dpofast.demo.run.run_demo", lambda *given: called.append(given))
    monkeypatch.setattr("dpofast.demo.compare.compare", lambda *given: called.append(given))
    usual = ["demo", "--output-dir", str(tmp_path)]
    for arguments in (
        usual,
        [*usual, "--loss-type", "ipo", "--beta", "0.3", "--seed", "4"],
        [*usual, "--loss_type", "ipo", "apo_zero"],
        [*usual, "--beta", "1", "2"],
    ):
        assert main(arguments) == 0
    assert called == [
        (tmp_path, 0, Recipe("sigmoid", 1.0)),
        (tmp_path, 4, Recipe("ipo", 0.3)),
        (tmp_path, 0, [Recipe("ipo", 1.0), Recipe("apo_zero", 1.0)]),
        (tmp_path, 0, [Recipe("sigmoid", 1.0), Recipe("sigmoid", 2.0)]),
    ]


def test_measurements_are_changes_since_the_warm_up(tmp_path: Path) -> None:
    assert measurements(start_in(tmp_path), AFTER) == {
        "eval_accuracy": 1.0,
        "policy_accuracy_equal_length": 1.0,
        "exact_answers": 1.0,
        "margin": 5.5,
        "chosen_logps_change": 1.5,
        "rejected_logps_change": -4.0,
    }


@pytest.mark.parametrize("error", [NonFiniteError("A NaN."), ModelError("No gradient.")])
def test_a_run_that_diverges_is_a_row(tmp_path: Path, error: DPOFastError) -> None:
    def diverge(recipe: Recipe, output_dir: Path) -> Measured:
        raise error

    run = run_recipe(Recipe("ipo", 0.1), tmp_path, start_in(tmp_path), diverge)
    assert (run.loss_type, run.beta, run.measured, run.error) == ("ipo", 0.1, None, str(error))


def test_other_errors_end_the_comparison(tmp_path: Path) -> None:
    def refuse(recipe: Recipe, output_dir: Path) -> Measured:
        raise ConfigError("An option.")

    with pytest.raises(ConfigError, match="An option"):
        run_recipe(Recipe(), tmp_path, start_in(tmp_path), refuse)


def stub(monkeypatch: pytest.MonkeyPatch, ends: dict[Recipe, BaseException]) -> list[Path]:
    """Let runs train nothing, and let some of them end with an exception.

    Returns:
        The folders of the runs, once they have begun.
    """
    folders: list[Path] = []

    def train(start: Start, recipe: Recipe, output_dir: Path, screen: Any) -> tuple[Any, Measured]:
        folders.append(output_dir)
        if recipe in ends:
            raise ends[recipe]
        return None, AFTER

    monkeypatch.setattr("dpofast.demo.compare.prepare", lambda folder, *rest: start_in(folder))
    monkeypatch.setattr("dpofast.demo.compare.train", train)
    return folders


@pytest.mark.filterwarnings("error:constrained_layout")
def test_a_comparison_goes_on_after_a_run_that_diverges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = make_recipes(["ipo", "sigmoid"], [0.1, 1e-7])
    folders = stub(monkeypatch, {recipes[1]: NonFiniteError("The loss is NaN in step 3.")})
    content = compare(tmp_path, 7, recipes)

    assert len(set(folders)) == 4
    assert json.loads((tmp_path / "comparison.json").read_text()) == content
    assert [(run["loss_type"], run["beta"]) for run in content["runs"]] == [
        (recipe.loss_type, recipe.beta) for recipe in recipes
    ]
    assert [run["measured"] is None for run in content["runs"]] == [False, True, False, False]
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines[0].startswith("| loss | beta | chosen gained more | ranked right, equal length |")
    assert lines[2:7] == [
        "| before |  | 0.0% | 0.0% | 50.0% | +0.0 | +0.0 | +0.0 |",
        "| ipo | 0.1 | 100.0% | 100.0% | 100.0% | +5.5 | +1.5 | -4.0 |",
        "| ipo | 1e-07 | failed |  |  |  |  |  |",
        "| sigmoid | 0.1 | 100.0% | 100.0% | 100.0% | +5.5 | +1.5 | -4.0 |",
        "| sigmoid | 1e-07 | 100.0% | 100.0% | 100.0% | +5.5 | +1.5 | -4.0 |",
    ]
    assert lines[-1] == "ipo, beta 1e-07: The loss is NaN in step 3."
    assert (tmp_path / "comparison.png").read_bytes().startswith(PNG)
    printed = " ".join(capsys.readouterr().out.split())
    assert "trained in 4 ways On two CPU cores" in printed
    assert "3 more to come, in about 0.0 minutes." in printed
    assert "Failed: The loss is NaN in step 3." in printed


def test_an_interrupted_comparison_leaves_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = make_recipes(["ipo"], [0.1, 0.2, 0.3])
    stub(monkeypatch, {recipes[2]: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path, 7, recipes)
    runs = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert [run["beta"] for run in runs] == [0.1, 0.2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_runs_of_a_comparison_are_those_that_run_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short version of the real thing: fewer pairs, and one epoch of warm-up."""
    size = DemoSize(facts=16, lists=32, held_out=4, warmup_lists=32)
    monkeypatch.setattr(training, "make_data", lambda seed: make_data(seed, size))
    short = WarmupOptions(epochs=1, warmup_steps=4)
    monkeypatch.setattr(
        training,
        "warm_up",
        lambda model, tokenizer, texts, on_step: warm_up(model, tokenizer, texts, short, on_step),
    )
    # With a beta of 1e60, gradients overflow in the first step.
    recipes = make_recipes(["sigmoid", "simpo"], [1e60, 0.5, 2.0])
    content = compare(tmp_path / "all", 1, recipes)

    runs = {Recipe(run["loss_type"], run["beta"]): run for run in content["runs"]}
    assert list(runs) == recipes
    assert json.loads((tmp_path / "all" / "comparison.json").read_text()) == content
    lines = (tmp_path / "all" / "comparison.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in lines[3:9]] == [
        [f"| {loss}", beta] for loss in ("sigmoid", "simpo") for beta in ("1e+60", "0.5", "2")
    ]
    assert (tmp_path / "all" / "comparison.png").read_bytes().startswith(PNG)
    diverged = [runs.pop(recipes[0]), runs.pop(recipes[3])]
    assert [run["measured"] for run in diverged] == [None, None]
    assert all(run["error"].startswith("Step 1: ") for run in diverged)
    figures = [tuple(run["measured"].values()) for run in runs.values()]
    assert len(set(figures)) == 4
    assert all(run["measured"]["margin"] > 0.1 for run in runs.values())
    assert content["before"]["margin"] == content["before"]["eval_accuracy"] == 0
    # The log-probs of held-out and training answers were scored once, for all runs.
    summaries = [
        json.loads((tmp_path / "all" / "runs" / name / "summary.json").read_text())
        for name in ("sigmoid-0.5", "sigmoid-2.0")
    ]
    assert [summary["ref_rows_scored"] for summary in summaries] == [0, 0]
    assert all(summary["ref_store_hits"] > 0 for summary in summaries)

    for recipe in (recipes[1], recipes[5]):  # one with a reference, and one without
        alone = run_demo(tmp_path / "alone", 1, recipe)
        in_grid = runs[recipe]["measured"]
        assert alone["chosen_logps_change"] == in_grid["chosen_logps_change"]
        assert alone["rejected_logps_change"] == in_grid["rejected_logps_change"]
        for name in ("eval_accuracy", "policy_accuracy_equal_length", "exact_answers"):
            assert alone[f"{name}_after"] == in_grid[name]
        assert (alone["loss_type"], alone["beta"]) == (recipe.loss_type, recipe.beta)
    assert alone["first_loss_expected"] is None  # simpo has no reference

    single = run_demo(tmp_path / "kto", 1, Recipe("kto", 0.5))  # splits the pairs
    assert single["first_loss"] == pytest.approx(single["first_loss_expected"], abs=0.02)
    assert single["chosen_logps_change"] > single["rejected_logps_change"] + 0.1
    for name in ("train_pairs", "held_out_pairs"):
        assert single[name] == alone[name]
