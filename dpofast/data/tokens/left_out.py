"""The reasons for which training leaves out a tokenised pair."""

from __future__ import annotations

from dpofast.data.reading.reasons import BAD_ROW, EMPTY
from dpofast.data.tokens.truncate import Cut

IDENTICAL = "identical answers"
NO_ROOM = "no room for an answer"
IDENTICAL_CUT = "identical answers after the cut"
# In the order in which a report lists them.
REASONS = (IDENTICAL, EMPTY, NO_ROOM, IDENTICAL_CUT, BAD_ROW)


def reason_left_out(chosen_ids: list[int], rejected_ids: list[int], cut: Cut) -> str | None:
    """Why training leaves out a pair; None if it doesn't.

    Args:
        chosen_ids, rejected_ids: token ids of the answers before the cut.
        cut: the cut that the pair gets.
    """
    if chosen_ids == rejected_ids:
        return IDENTICAL
    if not cut.fits:
        return NO_ROOM
    _, kept_chosen, kept_rejected = cut.apply([], chosen_ids, rejected_ids)
    return IDENTICAL_CUT if kept_chosen == kept_rejected else None
