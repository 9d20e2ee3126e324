"""Losses other than DPO's own train as a textbook loop with their formulas, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpofast_kernels import make_loss
from tests.kernels.preference.formulas import plain_formula
from tests.support import (
    BETA,
    LEARNING_RATE,
    PlainDPO,
    answer_logps,
    float64_throughout,
    make_trainer,
    tiny_llama,
    token_pairs,
    train,
)


def score_js(u):
    return torch.log(2.0 / (1.0 + torch.exp(-u)))


def formula(name, **options):
    loss = make_loss(name, BETA, **options)
    return lambda a, b, lengths: plain_formula(loss, a, b, lengths)


# One of each kind, with the formula of its pairs.
CASES = {
    "of each answer": ({"loss_type": "apo_zero"}, formula("apo_zero")),
    "length-normalised": ({"loss_type": "sigmoid_norm"}, formula("sigmoid_norm")),
    "own option": ({"loss_type": "dpop", "dpop_lambda": 5.0}, formula("dpop", dpop_lambda=5.0)),
    "smoothed": (
        {"loss_type": "exo_pair", "label_smoothing": 0.1},
        formula("exo_pair", label_smoothing=0.1),
    ),
    "mixture": (
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
        lambda a, b, n: 0.8 * formula("sigmoid")(a, b, n) + 0.2 * formula("bco_pair")(a, b, n),
    ),
    "divergence": (
        {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
        lambda a, b, n: formula("sigmoid")(score_js(a), score_js(b), n),
    ),
}


class PlainLoss(PlainDPO):
    """The textbook loop with another loss.

    Args:
        formula: log-ratios [1] of chosen and rejected, and lengths [1, 2] -> loss [1].
    """

    def __init__(self, formula, *args):
        super().__init__(*args)
        self.formula = formula

    def loss(self, pair):
        answers = [pair["chosen_ids"], pair["rejected_ids"]]
        lengths = torch.tensor([[len(answer) for answer in answers]])
        ratios = [self._logratio(pair["prompt_ids"], answer).view(1) for answer in answers]
        return self.formula(*ratios, lengths).sum()

    def _logratio(self, prompt, answer):
        with torch.no_grad():
            reference = answer_logps(self.reference, prompt, answer)
        return answer_logps(self.model, prompt, answer) - reference


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "shared"},
        pytest.param({"layout": "padded"}, marks=pytest.mark.slow),
        # long pairs, and several micro-batches
        pytest.param({"max_tokens_per_microbatch": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_float64_training_is_a_textbook_loop(tmp_path, case, options):
    named, formula = CASES[case]
    pairs = token_pairs(10)
    with float64_throughout():
        plain = PlainLoss(formula, tiny_llama().double(), BETA, LEARNING_RATE)
        expected = np.asarray(plain.train(pairs, 4, 6, seed=3))
        trainer = make_trainer(tmp_path, tiny_llama().double(), pairs, options=named | options)
        got = np.asarray(train(trainer))
    assert abs(expected[-1, 0] / expected[0, 0] - 1) > 0.01  # it learns
    np.testing.assert_allclose(got[:, 0], expected[:, 0], atol=1e-9, rtol=0)
    np.testing.assert_allclose(got[:, 1], expected[:, 1], rtol=1e-8)
    for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
