"""Reads reference log-probs of answers whose tokens have weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dpofast.reference.build.answers import PairAnswers
from dpofast.reference.build.builder import refuse_missing, refuse_wrong
from dpofast.reference.store.namespace import Namespace
from dpofast.reference.store.row_detail import RowDetail

# Token counts [m, 2] of the answers of m pairs -> weights [N] of their tokens, in the same order.
TokenWeights = Callable[[np.ndarray], np.ndarray]
PART_ANSWERS = 2_000  # answers whose tokens are in memory at a time; an even number


def weighted_logps(namespace: Namespace, answers: PairAnswers, weights: TokenWeights) -> np.ndarray:
    """Read the per-token reference log-probs of all pairs, and sum them with weights.

    Args:
        namespace: namespace of the reference.
        answers: answers of the dataset, from `read_answers`.
        weights: says how much each token's log-prob counts.

    Returns:
        [n, 2] fp64, weighted sums of the chosen and the rejected answer of each pair, in nats.

    Raises:
        MissingRowsError: rows are missing, or stored without per-token log-probs.
        ReferenceStoreError: rows are damaged, or a sum isn't finite or is above 0.

    Numerics: log-probs are stored in fp32, and summed in fp64.
    """
    namespace.refresh()
    detail = RowDetail.LOGPS
    refuse_missing(namespace, answers, namespace.contains(answers.keys, detail), detail)
    # An answer's weights depend on the other one of the pair, so each pair is summed by itself.
    of_pairs = answers.pairs.reshape(-1)  # [2n]
    parts = [
        of_pairs[start : start + PART_ANSWERS] for start in range(0, len(of_pairs), PART_ANSWERS)
    ]
    sums = [_weighted_sums(namespace, answers.keys[part], weights) for part in parts]
    logps = np.concatenate([np.empty(0), *sums])
    refuse_wrong(namespace, answers, logps, of_pairs)
    return logps.reshape(-1, 2)


def _weighted_sums(namespace: Namespace, keys: np.ndarray, weights: TokenWeights) -> np.ndarray:
    rows = namespace.read(keys)
    lengths = rows.num_tokens.astype(np.int64)  # [2m]
    per_token = np.concatenate(rows.per_token_logps).astype(np.float64)  # [N]
    products = weights(lengths.reshape(-1, 2)) * per_token
    sums: np.ndarray = np.add.reduceat(products, lengths.cumsum() - lengths)  # no answer is empty
    return sums
