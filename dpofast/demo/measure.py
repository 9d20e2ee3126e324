"""Measures the demo's model: log-probs of held-out pairs, and the answers that it generates."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpofast.demo.tasks import Row

# Nats. A model's log-probs of the same answer differ by about 1e-6 between batches of different
# shapes. Before training, all log-ratios are 0 up to that noise, and must not count as wins.
ROUNDING = 1e-3


@dataclass(frozen=True)
class PolicyScores:
    """A policy's log-probs of pairs; the reference plays no part in them.

    Attributes:
        logps: [P, 2] fp64, summed log-probs of chosen and rejected, in nats.
        equal_length: [P] bool, True if both answers have the same number of tokens.
    """

    logps: np.ndarray
    equal_length: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen answer is more probable than the rejected one."""
        return float(self._is_right().mean())

    @property
    def equal_length_accuracy(self) -> float:
        """`accuracy` of pairs with equally long answers, where preferring short ones can't help."""
        return float(self._is_right()[self.equal_length].mean())

    def _is_right(self) -> np.ndarray:
        chosen, rejected = self.logps.T
        return np.asarray(chosen > rejected)


def reward_accuracy(logps: np.ndarray, ref_logps: np.ndarray) -> float:
    """Share of pairs whose chosen answer has the higher reward; ties count as wrong.

    Args:
        logps: [P, 2] fp64, summed log-probs of chosen and rejected under the policy, in nats.
        ref_logps: [P, 2] fp64, the same under the reference.
    """
    chosen, rejected = (logps - ref_logps).T
    return float((chosen - rejected > ROUNDING).mean())


def score_policy(model: Any, pairs: Any, pad_token_id: int, batch_pairs: int = 32) -> PolicyScores:
    """Compute a model's log-probs of tokenised pairs.

    Args:
        model: causal LM.
        pairs: mappings with prompt_ids, chosen_ids and rejected_ids, lists of token ids.
        pad_token_id: fills the ends of shorter sequences.
        batch_pairs: pairs in a forward pass.
    """
    from dpofast.data.packing.collate import Layout
    from dpofast.model.scorer import SequenceScorer

    # The demo's model is in float32, so no autocast.
    scorer = SequenceScorer(model, contextlib.nullcontext, Layout("padded", pad_token_id))
    pairs = list(pairs)
    logps = []
    for start in range(0, len(pairs), batch_pairs):
        sequences = [
            (pair["prompt_ids"], pair[side])
            for pair in pairs[start : start + batch_pairs]
            for side in ("chosen_ids", "rejected_ids")
        ]
        logps += [per_token_logps.sum() for per_token_logps in scorer(sequences)]
    equal = [len(pair["chosen_ids"]) == len(pair["rejected_ids"]) for pair in pairs]
    return PolicyScores(np.array(logps).reshape(-1, 2), np.array(equal))


def answer(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int = 48) -> list[str]:
    """Generate an answer to each prompt by greedy decoding."""
    import torch

    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    # The template has added all special tokens. Padding is on the left, because generation
    # continues after the last column.
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
    """Share of answers that equal the row's chosen answer, to the letter."""
    pairs = zip(answers, rows, strict=True)
    return sum(given == row["chosen"][0]["content"] for given, row in pairs) / len(rows)
