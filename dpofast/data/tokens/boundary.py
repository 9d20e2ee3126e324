"""Splits a tokenised row where the prompt ends; all its answers get the same prompt ids.

A pair has two answers, an unpaired row has one. The rules, for the prompt's text p and an answer's
text a:

1. Usually tokens(p + a) begin with tokens(p). Then the answer is the rest.
2. If the tokenizer merges the end of p with the beginning of a, the prompt keeps tokens(p), from
   which the model generates, and the answer is tokenised by itself. Some tokenizers put a blank
   before every text, which would change the answer. It is then tokenised after a line break
   instead. If that changes it too, the row is split as in rule 3.
3. If a chat template renders the prompt alone differently than before an answer, the prompt is the
   common prefix of all token sequences, and the answers are the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpofast.data.prefix import common_prefix_length

Ids = list[int]


@dataclass(frozen=True, slots=True)
class SplitRow:
    """Token ids of a row, and the rule by which it was split.

    Attributes:
        prompt_ids: token ids of the prompt.
        answers: token ids of each answer.
        merged: rule 2 was needed.
        rerendered: rule 3 was needed.
    """

    prompt_ids: Ids
    answers: tuple[Ids, ...]
    merged: bool = False
    rerendered: bool = False

    @property
    def ids(self) -> tuple[Ids, ...]:
        return self.prompt_ids, *self.answers

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.ids))


@dataclass(frozen=True, slots=True)
class RowTexts:
    """The texts of a row that are to be tokenised.

    Attributes:
        prompt: the prompt.
        wholes: the prompt followed by each answer.
        rendered: a chat template made the texts, with all special tokens; otherwise they are
            plain, and the tokenizer's leading tokens (BOS) go before them unless already there.
    """

    prompt: str
    wholes: tuple[str, ...]
    rendered: bool = False


class BoundaryTokenizer:
    """Tokenises rows and splits them at the end of the prompt, with any tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.leading_ids = self._leading_ids()

    def encode(self, texts: list[str]) -> list[Ids]:
        """Token ids of each text. No special tokens are added; those in the text are recognised."""
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[Ids] = encoded["input_ids"]
        return ids

    def split(self, rows: Sequence[RowTexts]) -> list[SplitRow]:
        """Tokenise and split each row."""
        # One call for all texts: fast tokenizers work on a batch in parallel.
        ids = iter(self.encode([text for row in rows for text in (row.prompt, *row.wholes)]))
        return [self._split(row, next(ids), [next(ids) for _ in row.wholes]) for row in rows]

    def _split(self, texts: RowTexts, prompt: Ids, whole_ids: list[Ids]) -> SplitRow:
        if not texts.rendered:
            prompt, whole_ids = self._with_leading(prompt), list(map(self._with_leading, whole_ids))
        size = len(prompt)
        # Rule 1
        if all(ids[:size] == prompt for ids in whole_ids):
            return SplitRow(prompt, tuple(ids[size:] for ids in whole_ids))
        # Rule 3: the ids differ because the texts do, not because of a merge.
        if not all(whole.startswith(texts.prompt) for whole in texts.wholes):
            return _split_at_common_prefix(prompt, whole_ids, rerendered=True)
        # Rule 2
        answers = [
            self._after(prompt, ids, whole[len(texts.prompt) :])
            for ids, whole in zip(whole_ids, texts.wholes, strict=True)
        ]
        found = tuple(answer for answer in answers if answer is not None)
        if len(found) < len(answers):
            return _split_at_common_prefix(prompt, whole_ids, merged=True)
        return SplitRow(prompt, found, merged=True)

    def _after(self, prompt: Ids, whole: Ids, answer: str) -> Ids | None:
        """The ids of an answer after exactly `prompt`; None if the split must be by rule 3 instead.

        Args:
            prompt: token ids of the prompt.
            whole: token ids of prompt and answer.
            answer: text of the answer.
        """
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        text = self._decode(whole)
        line_break, alone, after_break = self.encode(["\n", answer, "\n" + answer])
        if self._decode(prompt + alone) == text:
            return alone
        rest = after_break[len(line_break) :]
        if after_break[: len(line_break)] == line_break and self._decode(prompt + rest) == text:
            return rest
        # The common prefix becomes the prompt, which must not be empty. If there is none, the
        # answer's own tokens are the best that is left, though the decoded text differs.
        return alone if alone and not common_prefix_length(prompt, whole) else None

    def _decode(self, ids: Ids) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _leading_ids(self) -> Ids:
        """Special tokens that the tokenizer puts before every text, found by a probe.

        Tokenizers have no common attribute that names them.
        """
        probe = "a"
        bare = self.encode([probe])[0]
        full: Ids = self.tokenizer(probe, verbose=False)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        return []

    def _with_leading(self, ids: Ids) -> Ids:
        leading = self.leading_ids
        return ids if ids[: len(leading)] == leading else leading + ids


def _split_at_common_prefix(
    prompt: Ids, wholes: list[Ids], *, merged: bool = False, rerendered: bool = False
) -> SplitRow:
    size = min(common_prefix_length(prompt, whole) for whole in wholes)
    return SplitRow(prompt[:size], tuple(whole[size:] for whole in wholes), merged, rerendered)
