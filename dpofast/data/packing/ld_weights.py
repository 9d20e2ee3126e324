"""LD-DPO's weights of tokens: those by which an answer is longer than the other one count less."""

from __future__ import annotations

import numpy as np


def ld_weights(lengths: np.ndarray, alpha: float) -> np.ndarray:
    """The factor of each token's log-prob in the sum of its answer.

    Up to the length of the pair's shorter answer it is 1, and beyond that it is alpha.

    Args:
        lengths: [P, 2] int, scored tokens of the chosen and the rejected answer of each pair.
        alpha: `ld_alpha`, in [0, 1].

    Returns:
        [N] fp64, the tokens of chosen_0, rejected_0, chosen_1, ...

    Source: arXiv:2409.06411.
    """
    own = lengths.astype(np.int64).ravel()  # [2P]
    shared = lengths.min(1).repeat(2)  # [2P]
    starts = own.cumsum() - own  # [2P]
    places = np.arange(own.sum()) - starts.repeat(own)  # [N], of each token in its answer
    return np.where(places < shared.repeat(own), 1.0, alpha)
