"""CPO, SimPO, AlphaPO and ORPO train as with TRL's experimental trainers, step by step."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from dpofast import CPOConfig, CPOTrainer, ORPOConfig, ORPOTrainer
from tests.peer.test_trl_losses import (
    OPTIONS,
    PAIRS_PER_STEP,
    STEPS,
    column,
    logs_of,
    race_llama,
)
from tests.support import byte_tokenizer, clip_exactly

pytest.importorskip("trl", reason="needs the extra `bench`")

pytestmark = [pytest.mark.peer, pytest.mark.slow]  # imports TRL

CASES = [
    {},
    {"label_smoothing": 0.1, "cpo_alpha": 0.3},
    {"loss_type": "hinge"},
    {"loss_type": "ipo", "cpo_alpha": 0.0},
    {"loss_type": "simpo"},
    {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 1.0},
    {"loss_type": "simpo", "alpha": 0.25, "cpo_alpha": 0.0, "beta": 2.5},
]
# TRL's rewards of IPO, SimPO and ORPO are those of means per token, as ours; its logps are means.
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def texts():
    """Pairs of text that the byte tokenizer reads letter by letter."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghij "))

    def text(most):
        return "".join(generator.choice(letters, int(generator.integers(2, most))))

    rows = [
        {"prompt": text(12) + ":", "chosen": text(14), "rejected": text(14)}
        for _ in range(STEPS * PAIRS_PER_STEP)
    ]
    return Dataset.from_list(rows)


def token_ids(tokenised):
    """The ids that TRL has made of its texts, as columns of ours."""
    rows = []
    for row in tokenised:
        start = len(row["prompt_input_ids"])
        assert row["chosen_labels"][:start] == [-100] * start
        rows.append(
            {
                "prompt_ids": row["chosen_input_ids"][:start],
                "chosen_ids": row["chosen_input_ids"][start:],
                "rejected_ids": row["rejected_input_ids"][start:],
            }
        )
    return Dataset.from_list(rows)


def exact(trainer_class):
    class Exact(trainer_class):
        """TRL's trainer with a gradient norm that loses no digits on a CPU."""

        def _clip_grad_norm(self, model):
            return clip_exactly(model.parameters(), self.args.max_grad_norm)

    return Exact


def both(folder, theirs, ours, options):
    their_trainer, their_config = theirs
    our_trainer, our_config = ours
    # TRL's own trainer asks for a limit; none of the texts reaches it.
    options = {**OPTIONS, **options, "max_steps": STEPS, "max_length": 512}
    options |= {"per_device_train_batch_size": PAIRS_PER_STEP, "remove_unused_columns": False}
    trl_trainer = exact(their_trainer)(
        race_llama(),
        args=their_config(output_dir=str(folder / "trl"), **options),
        train_dataset=texts(),
        processing_class=byte_tokenizer(),
    )
    trainer = our_trainer(
        race_llama(),
        args=our_config(output_dir=str(folder / "ours"), **options),
        train_dataset=token_ids(trl_trainer.train_dataset),
        processing_class=byte_tokenizer(),
    )
    return logs_of(trl_trainer), logs_of(trainer)


def assert_same(theirs, ours, rewards):
    assert len(ours) == len(theirs) == STEPS
    losses = column(theirs, "loss")
    assert max(abs(loss / losses[0] - 1) for loss in losses) > 0.05, losses
    for name in ("loss", "grad_norm"):
        expected = column(theirs, name)
        np.testing.assert_allclose(column(ours, name), expected, rtol=1e-4, err_msg=name)
    for name in rewards:
        expected = column(theirs, name)
        np.testing.assert_allclose(column(ours, name), expected, atol=1e-3, rtol=0, err_msg=name)


@pytest.mark.parametrize("options", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_cpo(tmp_path, options):
    from trl.experimental.cpo import CPOConfig as TheirConfig
    from trl.experimental.cpo import CPOTrainer as TheirTrainer

    theirs, ours = both(tmp_path, (TheirTrainer, TheirConfig), (CPOTrainer, CPOConfig), options)
    # TRL's rewards of AlphaPO are bent ones; ours are means of log-probs.
    assert_same(theirs, ours, () if options.get("alpha") else REWARDS)
    if options.get("cpo_alpha", 1.0):
        expected = column(theirs, "nll_loss")
        np.testing.assert_allclose(column(ours, "nll_loss"), expected, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"beta": 2.0}], ids=str)
def test_orpo(tmp_path, options):
    from trl.experimental.orpo import ORPOConfig as TheirConfig
    from trl.experimental.orpo import ORPOTrainer as TheirTrainer

    theirs, ours = both(tmp_path, (TheirTrainer, TheirConfig), (ORPOTrainer, ORPOConfig), options)
    assert_same(theirs, ours, REWARDS)
    expected = column(theirs, "nll_loss")
    np.testing.assert_allclose(column(ours, "nll_loss"), expected, rtol=1e-4)
