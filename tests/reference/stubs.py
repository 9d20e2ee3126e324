"""Identities, rows, pairs and a scorer without a model, shared by the tests of reference."""

from __future__ import annotations

import random
import zlib

import numpy as np
from datasets import Dataset

from dpofast.reference.build.batches import BatchesOfAnswers
from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.reference.store.store import ReferenceStore

ROWS = {
    bytes([i] * 16): -np.random.default_rng(i).random(i % 5 + 1, dtype=np.float32)
    for i in range(12)
}
KEYS = list(ROWS)


def identity(**changes):
    return ReferenceIdentity.of(
        {"weights": "ab" * 16, "attention": "sdpa", "config": {"rope_theta": 1e4}, **changes}
    )


def write(folder, rows=ROWS, reference=None, commits=1):
    """Make a store with these rows, a segment for each commit; -> the rows' namespace."""
    namespace = ReferenceStore.open(folder, create=True).namespace(reference or identity())
    writer = namespace.writer()
    items = list(rows.items())
    for part in range(commits):
        for key, values in items[part::commits]:
            writer.add(key, values)
        assert writer.commit() == len(items[part::commits])
    return namespace


def scores_of(values):
    """-> log-probs and log-sum-exps that differ from them: [2, num_tokens]."""
    return np.stack([values, 3 - 2 * values])


def pairs(num_pairs, seed=0):
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(1000) for _ in range(rng.randint(low, high))]

    return Dataset.from_list(
        [
            {"prompt_ids": ids(1, 9), "chosen_ids": ids(1, 9), "rejected_ids": ids(1, 9)}
            for _ in range(num_pairs)
        ]
    )


def stub_logps(prompt, answer):
    """-> per-token log-probs that depend on every id: [len(answer)] fp32."""
    seed = zlib.crc32(repr((list(prompt), list(answer))).encode())
    return -np.random.default_rng(seed).random(len(answer), dtype=np.float32) * 5


def batches_of(num_answers):
    """Batches of so many answers; a call costs the tokens of its sequences."""

    def num_tokens(sequences):
        return sum(len(prompt) + len(answer) for prompt, answer in sequences)

    return BatchesOfAnswers(num_answers, num_tokens)


class StubScorer:
    def __init__(self):
        self.calls = []

    def __call__(self, sequences):
        self.calls.append(sequences)
        return [stub_logps(*sequence) for sequence in sequences]

    @property
    def scored(self):
        return [sequence for call in self.calls for sequence in call]


def expected_logps(dataset):
    return np.array(
        [
            [
                stub_logps(pair["prompt_ids"], pair[side]).sum(dtype=np.float64)
                for side in ("chosen_ids", "rejected_ids")
            ]
            for pair in dataset
        ]
    )
