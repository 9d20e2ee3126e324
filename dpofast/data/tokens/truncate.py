"""Cuts a pair to `max_length` tokens of prompt and answer together, the prompt once for both."""

from __future__ import annotations

from dataclasses import dataclass

from dpofast.errors import ConfigError

TRUNCATION_MODES = ("keep_start", "keep_end")


@dataclass(frozen=True, slots=True)
class Cut:
    """How many tokens a pair loses; `fits` is False where no answer token would be left.

    Attributes:
        prompt: tokens cut from the prompt's left.
        chosen: tokens cut from the chosen answer's right.
        rejected: tokens cut from the rejected answer's right.
        fits: False where the prompt leaves no room for a token of each answer.
    """

    prompt: int = 0
    chosen: int = 0
    rejected: int = 0
    fits: bool = True


def check_truncation(max_length: int | None, truncation_mode: str) -> None:
    """Refuse a length that holds no pair, and an unknown mode.

    Raises:
        ConfigError: names the option.
    """
    if truncation_mode not in TRUNCATION_MODES:
        raise ConfigError(
            f"truncation_mode is {truncation_mode!r}, expected 'keep_start' or 'keep_end'"
        )
    if max_length is None:
        return
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ConfigError(
            f"max_length is {max_length!r}, expected an integer of at least 2 (a token of the "
            "prompt and one of the answer) or None for no limit"
        )


def plan_cut(
    prompt: int, chosen: int, rejected: int, max_length: int | None, truncation_mode: str
) -> Cut:
    """What to cut from a pair of these lengths in tokens (each at least 1).

    keep_start leaves the prompt whole and cuts answers on the right. keep_end first cuts the
    prompt on its left by what the longer answer needs, down to one token, then the answers.
    """
    if max_length is None:
        return Cut()
    prompt_cut = 0
    if truncation_mode == "keep_end":
        needed = prompt + max(chosen, rejected) - max_length
        prompt_cut = max(0, min(needed, prompt - 1))
    room = max_length - (prompt - prompt_cut)
    if room < 1:
        return Cut(fits=False)
    return Cut(prompt_cut, max(0, chosen - room), max(0, rejected - room))
