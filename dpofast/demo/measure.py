"""What the demo measures of a model: log-probs of held-out pairs, and answers in its own words."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpofast.demo.tasks import Row

# The same model gives an answer log-probs that differ by some 1e-6 nats when it stands in a batch
# of another shape. A log-ratio is a tie below this, as before training, when all of them are 0.
ROUNDING = 1e-3


@dataclass(frozen=True)
class PolicyScores:
    """A policy's own log-probs, without any reference.

    Attributes:
        logps: [P, 2] fp64, summed log-probs of chosen and rejected, in nats.
        equal_length: [P] bool, whether both answers have the same number of tokens.
    """

    logps: np.ndarray
    equal_length: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen answer is more probable than the rejected one."""
        return float(self._is_right().mean())

    @property
    def equal_length_accuracy(self) -> float:
        """The same over pairs of equally long answers, where brevity can't help."""
        return float(self._is_right()[self.equal_length].mean())

    def _is_right(self) -> np.ndarray:
        chosen, rejected = self.logps.T
        return np.asarray(chosen > rejected)


def reward_accuracy(logps: np.ndarray, ref_logps: np.ndarray) -> float:
    """Share of pairs whose chosen answer is rewarded above the rejected one; ties are wrong.

    Args:
        logps: [P, 2] fp64, summed log-probs of chosen and rejected under the policy, in nats.
        ref_logps: [P, 2] fp64, under the reference.
    """
    chosen, rejected = (logps - ref_logps).T
    return float((chosen - rejected > ROUNDING).mean())


def score_policy(model: Any, pairs: Any, pad_token_id: int, batch_pairs: int = 32) -> PolicyScores:
    """Score tokenised pairs (columns prompt_ids, chosen_ids, rejected_ids) under a model."""
    from dpofast.data.packing.collate import Layout
    from dpofast.model.scorer import SequenceScorer

    scorer = SequenceScorer(model, contextlib.nullcontext, Layout("padded", pad_token_id))
    rows = list(pairs)
    logps = []
    for start in range(0, len(rows), batch_pairs):
        sequences = [
            (row["prompt_ids"], row[side])
            for row in rows[start : start + batch_pairs]
            for side in ("chosen_ids", "rejected_ids")
        ]
        logps += [per_token_logps.sum() for per_token_logps in scorer(sequences)]
    equal = [len(row["chosen_ids"]) == len(row["rejected_ids"]) for row in rows]
    return PolicyScores(np.array(logps).reshape(-1, 2), np.array(equal))


def answer(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int = 48) -> list[str]:
    """Each prompt's most probable answer, token by token (greedy decoding)."""
    import torch

    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    inputs = tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    answers = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def exact_share(answers: list[str], rows: list[Row]) -> float:
    """Share of answers that are the chosen one, to the letter."""
    pairs = zip(answers, rows, strict=True)
    return sum(given == row["chosen"][0]["content"] for given, row in pairs) / len(rows)
