"""Cuts pairs to `max_length` tokens of prompt and answer; both answers keep the same prompt."""

from __future__ import annotations

from dataclasses import dataclass

from dpofast.errors import ConfigError

TRUNCATION_MODES = ("keep_start", "keep_end")


@dataclass(frozen=True, slots=True)
class Cut:
    """The number of tokens that a pair loses.

    Attributes:
        prompt: tokens cut from the prompt, on its left.
        chosen: tokens cut from the chosen answer, on its right.
        rejected: tokens cut from the rejected answer, on its right.
        fits: False if the prompt leaves no room for any answer token; the counts are then 0.
    """

    prompt: int = 0
    chosen: int = 0
    rejected: int = 0
    fits: bool = True

    def apply(
        self, prompt: list[int], chosen: list[int], rejected: list[int]
    ) -> tuple[list[int], list[int], list[int]]:
        """The pair's token ids after the cut."""
        return (
            prompt[self.prompt :],
            chosen[: len(chosen) - self.chosen],
            rejected[: len(rejected) - self.rejected],
        )


def check_truncation(max_length: int | None, truncation_mode: str) -> None:
    """Check the options `max_length` and `truncation_mode`.

    Raises:
        ConfigError: the mode is unknown, or no pair can fit the length; names the option.
    """
    if truncation_mode not in TRUNCATION_MODES:
        expected = " or ".join(map(repr, TRUNCATION_MODES))
        raise ConfigError(f"truncation_mode is {truncation_mode!r}, expected {expected}")
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
    """Decide what to cut from a pair.

    keep_start leaves the prompt whole and cuts answers on the right. keep_end cuts the prompt on
    its left first, by as much as the longer answer needs, down to one token. Then it cuts answers.

    Args:
        prompt, chosen, rejected: tokens in each part, at least 1.
        max_length: most tokens in a prompt and one answer; None for no limit.
        truncation_mode: keep_start or keep_end.
    """
    if max_length is None:
        return Cut()
    prompt_cut = 0
    if truncation_mode == "keep_end":
        needed = prompt + max(chosen, rejected) - max_length
        # One prompt token has to stay: it predicts the first token of an answer.
        prompt_cut = max(0, min(needed, prompt - 1))
    # Both answers share the prompt and its cut, so they have the same room.
    room = max_length - (prompt - prompt_cut)
    if room < 1:
        return Cut(fits=False)
    return Cut(prompt_cut, max(0, chosen - room), max(0, rejected - room))
