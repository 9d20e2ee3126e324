"""What must be finite before a run's first step: weights, and log-probs that data brings."""

from __future__ import annotations

import numpy as np
from torch import nn

from dpofast.columns import LOGP_ROUNDING, REF_COLUMNS
from dpofast.errors import DataError, NonFiniteError
from dpofast.model.finite import non_finite_names
from dpofast.train.data.dataset import RunDataset
from dpofast.train.exchange import exchange
from dpofast.train.finite.non_finite import distinct, have, names_in_words


def check_weights(model: nn.Module, what: str) -> None:
    """Check that all weights of a model are finite. All ranks must call this together.

    Args:
        model: the policy or the reference.
        what: what it is called in the message.

    Raises:
        NonFiniteError: a weight is NaN or infinite on one of the ranks; the same on all of them.
    """
    names = distinct(exchange(non_finite_names(model.named_parameters())))
    if names:
        raise NonFiniteError(
            f"{what} can't be used: {names_in_words(names)} {have(names)} NaN or infinite elements "
            "before the first step; load another copy or an earlier checkpoint of it, or, if it "
            "was cast to float16, load it in bfloat16 or float32."
        )


def check_own_logps(dataset: RunDataset, values: np.ndarray) -> None:
    """Check reference log-probs that a dataset brings: [n, 2], of its n pairs.

    Raises:
        DataError: one isn't a finite number, or is above 0; names the row.
    """
    is_finite, is_possible = np.isfinite(values), values <= LOGP_ROUNDING
    bad = np.flatnonzero(~(is_finite & is_possible).all(1))
    if bad.size:
        pair = int(bad[0])
        row = dataset.pairs["row"][pair]
        wrong = "is above 0" if is_finite[pair].all() else "is not a finite number"
        raise DataError(
            f"{dataset.name}: {' or '.join(REF_COLUMNS)} of row {row} {wrong}, which no log-prob "
            "is; leave both columns out to have them computed."
        )
