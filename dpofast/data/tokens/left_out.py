"""The reasons for which training leaves out a tokenised row."""

from __future__ import annotations

from collections.abc import Sequence

from dpofast.data.reading.reasons import BAD_ROW, EMPTY, IDENTICAL
from dpofast.data.tokens.truncate import Cut

NO_ROOM = "no room for an answer"
IDENTICAL_CUT = "identical answers after the cut"
# In the order in which a report lists them.
REASONS = (IDENTICAL, EMPTY, NO_ROOM, IDENTICAL_CUT, BAD_ROW)


def reason_left_out(answers: Sequence[list[int]], cut: Cut) -> str | None:
    """Why training leaves out a row; None if it doesn't.

    Args:
        answers: token ids of each answer before the cut.
        cut: the cut that the row gets.
    """
    if _are_identical(answers):
        return IDENTICAL
    if not cut.fits:
        return NO_ROOM
    if not any(cut.answers):  # as in nearly all rows
        return None
    _, *kept = cut.apply([], *answers)
    return IDENTICAL_CUT if _are_identical(kept) else None


def _are_identical(answers: Sequence[list[int]]) -> bool:
    """Whether there are several answers, and all are the same."""
    return len(answers) > 1 and all(answer == answers[0] for answer in answers)
