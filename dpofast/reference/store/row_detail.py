"""How much of an answer's score is stored."""

from __future__ import annotations

from enum import IntEnum


class RowDetail(IntEnum):
    """What a row holds beside its summed log-prob; each includes those before it."""

    SUMS = 0  # nothing
    LOGPS = 1  # the log-prob of each token
    LOGSUMEXPS = 2  # and the log-sum-exp of the logits at each token

    @property
    def added_values(self) -> str:
        """Name of the values that this level stores and the level below does not."""
        return ("summed log-probs", "per-token log-probs", "log-sum-exps")[self]


DETAILS = tuple(detail.name.lower() for detail in RowDetail)  # as options name them
