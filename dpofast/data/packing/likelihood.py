"""Terms of the loss that make chosen sequences likelier, as coefficients of log-probs.

Such a term is the mean over tokens of the negative log-likelihood. Its mean is taken over all
tokens of an optimizer step, so a plan has to count them before a micro-batch is laid out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc


@dataclass(frozen=True)
class Likelihood:
    """Weights of the terms; 0 for none.

    Attributes:
        answers: weight of the mean over the tokens of chosen answers.
        sequences: weight of the mean over the tokens of chosen answers and of their prompts, except
            for the first token, which nothing predicts.
    """

    answers: float = 0.0
    sequences: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.answers or self.sequences)

    @property
    def weight(self) -> float:
        """The weights of both terms."""
        return self.answers + self.sequences

    @property
    def scores_prompts(self) -> bool:
        """Whether the log-probs of prompts are needed."""
        return bool(self.sequences)


NO_LIKELIHOOD = Likelihood()


@dataclass(frozen=True)
class PairsPerToken:
    """Pairs over tokens, of all pairs that a mean is taken over.

    Losses are summed over pairs and divided by the number of pairs later. So this is what turns
    a sum over tokens into a mean over them.

    Attributes:
        answers: pairs over tokens of chosen answers.
        sequences: pairs over tokens of chosen answers and prompts.
    """

    answers: float
    sequences: float

    def coefficients(self, likelihood: Likelihood) -> tuple[float, float]:
        """What each nat of a chosen answer and of its prompt adds to the summed loss."""
        of_prompt = -likelihood.sequences * self.sequences
        return of_prompt - likelihood.answers * self.answers, of_prompt


@dataclass(frozen=True, eq=False)
class ChosenTokens:
    """The tokens that can be predicted in each pair of a dataset.

    Attributes:
        answers: [n] int64, tokens of the chosen answer.
        prompts: [n] int64, tokens of the prompt except for the first one.
    """

    answers: np.ndarray
    prompts: np.ndarray

    @classmethod
    def of(cls, pairs: Any) -> ChosenTokens:
        """Count the tokens of a datasets.Dataset with int lists prompt_ids and chosen_ids."""
        table = pairs.select_columns(["prompt_ids", "chosen_ids"]).with_format("arrow")[:]
        prompts, answers = (
            pc.list_value_length(table[name]).to_numpy().astype(np.int64)
            for name in ("prompt_ids", "chosen_ids")
        )
        return cls.of_lengths(prompts, answers)

    @classmethod
    def of_lengths(cls, prompts: np.ndarray, answers: np.ndarray) -> ChosenTokens:
        """Count the tokens of pairs, given the lengths [n] of prompts and chosen answers."""
        return cls(answers, np.maximum(prompts - 1, 0))

    def pairs_per_token(self, pairs: Sequence[int] | slice) -> PairsPerToken:
        """The figure of these pairs."""
        answers, prompts = self.answers[pairs], self.prompts[pairs]
        tokens = max(int(answers.sum()), 1)
        return PairsPerToken(len(answers) / tokens, len(answers) / (tokens + int(prompts.sum())))
