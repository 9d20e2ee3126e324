"""Cuts rows to the lengths that the options allow; all answers of a row keep the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpofast.errors import ConfigError

TRUNCATION_MODES = ("keep_start", "keep_end")


@dataclass(frozen=True, slots=True)
class Cut:
    """The number of tokens that a row loses.

    Attributes:
        prompt: tokens cut from the prompt, on its left.
        answers: tokens cut from each answer, on its right.
        fits: False if the prompt leaves no room for any answer token; the counts are then 0.
    """

    prompt: int
    answers: tuple[int, ...]
    fits: bool = True

    @classmethod
    def nothing(cls, num_answers: int, *, fits: bool = True) -> Cut:
        """The cut of a row that loses no token."""
        return cls(0, (0,) * num_answers, fits)

    def of_answers(self, places: Sequence[int]) -> Cut:
        """The cut of a pair of the answers, which is the same in whatever pair an answer is."""
        return Cut(self.prompt, tuple(self.answers[place] for place in places), self.fits)

    def apply(self, prompt: list[int], *answers: list[int]) -> tuple[list[int], ...]:
        """The token ids of the prompt and of each answer after the cut."""
        cut = zip(answers, self.answers, strict=True)
        return prompt[self.prompt :], *(answer[: len(answer) - n] for answer, n in cut)


@dataclass(frozen=True)
class LengthLimits:
    """The options that decide what is cut from a pair.

    Attributes:
        max_length: most tokens of a prompt and one answer; None for no limit.
        truncation_mode: keep_start leaves the prompt whole and cuts answers on the right. keep_end
            cuts the prompt on its left first, by as much as the longest answer needs, down to
            one token. Then it cuts answers.
        max_prompt_length: most tokens of a prompt, which is cut on its left; None for no limit.
        max_completion_length: most tokens of an answer, which is cut on its right; None for no
            limit. `max_length` is applied to what these two leave.

    Raises:
        ConfigError: the mode is unknown, or no pair can fit a length; names the option.
    """

    max_length: int | None = None
    truncation_mode: str = "keep_start"
    max_prompt_length: int | None = None
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        if self.truncation_mode not in TRUNCATION_MODES:
            expected = " or ".join(map(repr, TRUNCATION_MODES))
            raise ConfigError(f"truncation_mode is {self.truncation_mode!r}, expected {expected}")
        _check_length(
            "max_length", self.max_length, 2, " (a token of the prompt and one of the answer)"
        )
        _check_length("max_prompt_length", self.max_prompt_length, 1)
        _check_length("max_completion_length", self.max_completion_length, 1)

    @property
    def names(self) -> str:
        """The options that set a limit, joined by "and"; empty if none does."""
        return " and ".join(self._set())

    def __str__(self) -> str:
        parts = [f"{name} {value}" for name, value in self._set().items()]
        if self.max_length is not None:
            parts[-1] += f" ({self.truncation_mode})"
        return ", ".join(parts) or "no limit"

    def _set(self) -> dict[str, int]:
        names = ("max_prompt_length", "max_completion_length", "max_length")  # as they are applied
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def plan_cut(self, prompt: int, *answers: int) -> Cut:
        """Decide what to cut from a row.

        What an answer loses doesn't depend on the others under keep_start. Under keep_end, the
        longest answer decides on the prompt's cut, which all of them share.

        Args:
            prompt, answers: tokens in the prompt and in each answer, at least 1.
        """
        prompt_kept = _at_most(prompt, self.max_prompt_length)
        kept = [_at_most(length, self.max_completion_length) for length in answers]
        if self.max_length is not None:
            if self.truncation_mode == "keep_end":
                excess = prompt_kept + max(kept) - self.max_length
                # One prompt token has to stay: it predicts the first token of an answer.
                prompt_kept = max(1, prompt_kept - max(0, excess))
            # All answers share the prompt and its cut, so they have the same room.
            room = self.max_length - prompt_kept
            if room < 1:
                return Cut.nothing(len(answers), fits=False)
            kept = [min(length, room) for length in kept]
        lost = (length - n for length, n in zip(answers, kept, strict=True))
        return Cut(prompt - prompt_kept, tuple(lost))


def _at_most(length: int, limit: int | None) -> int:
    return length if limit is None else min(length, limit)


def _check_length(name: str, value: int | None, minimum: int, why: str = "") -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(
            f"{name} is {value!r}, expected an integer of at least {minimum}{why} or None for no "
            "limit"
        )
