"""Warms the demo's model up, trains it with a loss, and measures it before and after."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpofast.demo.data import DemoData, make_data, save_rows
from dpofast.demo.measure import (
    PolicyScores,
    answer,
    exact_share,
    reward_accuracy,
    score_policy,
)
from dpofast.demo.model import make_model, make_tokenizer
from dpofast.demo.screen import ProgressCallback, Screen
from dpofast.demo.warmup import warm_up
from dpofast.errors import ConfigError
from dpofast.options.named_loss import is_unpaired
from dpofast.train.reports.summary import reference_summary

BETA = 1.0  # ten times the usual, because a tiny model drifts away from its reference easily
EPOCHS = 6
LEARNING_RATE = 2e-4
PAIRS_PER_STEP = 16
# exo_pair needs label smoothing; this is its paper's (docs/losses.md).
LABEL_SMOOTHING = {"exo_pair": 1e-3}


@dataclass(frozen=True)
class Recipe:
    """The part of a run's options that the user of the demo chooses.

    Attributes:
        loss_type: name of one loss.
        beta: beta of the loss, above 0.
    """

    loss_type: str = "sigmoid"
    beta: float = BETA

    @property
    def title(self) -> str:
        """The recipe in words."""
        return f"{self.loss_type}, beta {self.beta:g}"


@dataclass(frozen=True)
class Measured:
    """Measurements of a model on the held-out pairs.

    Attributes:
        reward_accuracy: share of pairs whose chosen answer has gained more log-prob since the
            warm-up than the rejected one: the higher reward, whatever the loss.
        policy: the model's log-probs of both answers.
        answers: generated answers, one for each held-out prompt.
        exact: share of the generated answers that are right to the letter.
    """

    reward_accuracy: float
    policy: PolicyScores
    answers: list[str]
    exact: float


@dataclass(frozen=True)
class Start:
    """Where all runs of a seed begin: the warmed-up model, which is also their reference.

    Attributes:
        folder: folder with the data, the warmed-up model and the reference store.
        seed: random seed of data and weights.
        data: the demo's pairs.
        stored: counts as in summary.json, of the answers that were found and scored.
        pairs: the held-out pairs, tokenised.
        ref_logps: [P, 2] fp64, summed log-probs of held-out answers under the warmed-up model.
        measured: measurements of the warmed-up model.
    """

    folder: Path
    seed: int
    data: DemoData
    stored: dict[str, Any]
    pairs: Any
    ref_logps: np.ndarray
    measured: Measured

    def logps_change(self, after: Measured) -> np.ndarray:
        """[2] fp64: mean change of the held-out log-probs of chosen and rejected, in nats."""
        change = after.policy.logps.mean(axis=0) - self.measured.policy.logps.mean(axis=0)
        return np.asarray(change)


def make_recipes(losses: Sequence[str], betas: Sequence[float]) -> list[Recipe]:
    """Combine every loss with every beta, loss by loss.

    Raises:
        ConfigError: an unknown loss, a beta that isn't above 0, or a value that is named twice.
    """
    for option, values in (("loss_type", losses), ("beta", betas)):
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"{option}: {twice} occurs twice; name it once.")
    recipes = [Recipe(loss, beta) for loss in losses for beta in betas]
    for recipe in recipes:
        # Everything is checked before anything runs.
        make_config(Path("unused"), Path("unused"), recipe, seed=0)
    return recipes


def prepare(folder: Path, seed: int, screen: Screen) -> Start:
    """Make the data, warm the model up, and score all answers.

    Args:
        folder: folder to write the data, the warmed-up model and the reference store to.
        seed: random seed of data and weights.
        screen: what prints the progress.
    """
    _quiet()
    data = make_data(seed)
    save_rows(data.train, folder / "data" / "train.jsonl")
    save_rows(data.held_out, folder / "data" / "held_out.jsonl")
    screen.data(data, folder / "data")

    _warm_up(data, folder / "warm", seed, screen)

    # One trainer scores the answers, and others train. They find all log-probs in the store, as any
    # later run on these pairs would.
    scorer = make_trainer(folder, data, make_config(folder / "dpo", folder, Recipe(), seed))
    scorer.score_datasets()
    stored = reference_summary(scorer.reference)
    screen.reference(stored, folder / "reference")
    pairs, ref_logps = scorer.eval_dataset, scorer.eval_sets()["eval"].ref_logps
    measured = _measure(scorer, data, pairs, ref_logps)
    return Start(folder, seed, data, stored, pairs, ref_logps, measured)


def train(start: Start, recipe: Recipe, output_dir: Path, screen: Screen) -> tuple[Any, Measured]:
    """Train the warmed-up model with a recipe.

    Args:
        start: the model, its data and its reference log-probs.
        recipe: loss and beta.
        output_dir: folder of the run.
        screen: what prints the progress.

    Returns:
        The trainer, and measurements of the trained model.

    Raises:
        NonFiniteError: the run has diverged.
        ModelError: its first step has no gradient, or moves nothing.
    """
    config = make_config(output_dir, start.folder, recipe, start.seed)
    trainer = make_trainer(start.folder, start.data, config)
    with screen.progress(f"training by {recipe.title}") as progress:
        trainer.add_callback(ProgressCallback(progress))
        trainer.train()
    return trainer, _measure(trainer, start.data, start.pairs, start.ref_logps)


def make_config(output_dir: Path, folder: Path, recipe: Recipe, seed: int) -> Any:
    """Make the DPOConfig of a run in float32; `folder` is that of the reference store.

    Raises:
        ConfigError: an unknown loss, or a beta that isn't above 0.
    """
    from dpofast import DPOConfig
    from dpofast_kernels import UNPAIRED_LOSSES

    # A step of a loss of single answers has the two answers of as many pairs.
    batch = PAIRS_PER_STEP * (2 if recipe.loss_type in UNPAIRED_LOSSES else 1)
    config = DPOConfig(
        output_dir=str(output_dir),
        loss_type=recipe.loss_type,
        beta=recipe.beta,
        label_smoothing=LABEL_SMOOTHING.get(recipe.loss_type, 0.0),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=2,
        bf16=False,
        gradient_checkpointing=False,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    if not config.make_loss().is_reference_free:  # a loss without a reference warns of a store
        config.reference_store = str(folder / "reference")
    return config


def make_trainer(folder: Path, data: DemoData, config: Any) -> Any:
    """Make the trainer of the config's loss, for the warmed-up model of `folder`."""
    import datasets
    from transformers import PrinterCallback

    from dpofast import DPOTrainer, KTOTrainer

    trainer = (KTOTrainer if is_unpaired(config) else DPOTrainer)(
        model=str(folder / "warm"),
        args=config,
        train_dataset=datasets.Dataset.from_list(data.train),
        eval_dataset=datasets.Dataset.from_list(data.held_out),
    )
    trainer.dataset_names, trainer.eval_dataset_names = ["train.jsonl"], ["held_out.jsonl"]
    trainer.remove_callback(PrinterCallback)  # with disable_tqdm, it prints every log to stdout
    return trainer


def _quiet() -> None:
    """Silence log lines and progress bars, since the screen shows all of that itself."""
    import datasets
    import transformers

    logging.getLogger("dpofast").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _warm_up(data: DemoData, folder: Path, seed: int, screen: Screen) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    with screen.progress("supervised warm-up") as progress:
        warm_up(model, tokenizer, data.warmup, on_step=progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    screen.warmed_up(model.num_parameters(), folder)


def _measure(trainer: Any, data: DemoData, pairs: Any, ref_logps: np.ndarray) -> Measured:
    tokenizer = trainer.processing_class
    prompts = [row["prompt"][0]["content"] for row in data.held_out]
    answers = answer(trainer.model, tokenizer, prompts)
    policy = score_policy(trainer.model, pairs, tokenizer.pad_token_id)
    return Measured(
        reward_accuracy=reward_accuracy(policy.logps, ref_logps),
        policy=policy,
        answers=answers,
        exact=exact_share(answers, data.held_out),
    )
