"""How much a stored row says about its answer."""

from __future__ import annotations

from enum import IntEnum


class RowDetail(IntEnum):
    """Values in a stored row; each level includes the ones before it.

    The number of a level is the number of values that it stores for each token.
    """

    SUMS = 0  # the summed log-prob
    LOGPS = 1  # and the log-prob of each token
    LOGSUMEXPS = 2  # and the log-sum-exp of the logits at each token

    @property
    def added_values(self) -> str:
        """Name of the values that this level adds to the level before it."""
        return ("summed log-probs", "per-token log-probs", "log-sum-exps")[self]


DETAILS = tuple(detail.name.lower() for detail in RowDetail)  # names in options, by level
