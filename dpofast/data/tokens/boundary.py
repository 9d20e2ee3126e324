"""Splits a tokenised pair where the prompt ends; both answers get the same prompt ids.

The rules, for the prompt's text p and an answer's text a:

1. Usually tokens(p + a) begin with tokens(p). Then the answer is the rest.
2. If the tokenizer merges the end of p with the beginning of a, the prompt keeps tokens(p), from
   which the model generates, and the answer is tokenised by itself. Some tokenizers put a blank
   before every text, which would change the answer. It is then tokenised after a line break
   instead. If that changes it too, the pair is split as in rule 3.
3. If a chat template renders the prompt alone differently than before an answer, the prompt is the
   common prefix of all three token sequences, and the answers are the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpofast.data.prefix import common_prefix_length

Ids = list[int]


@dataclass(frozen=True, slots=True)
class SplitPair:
    """Token ids of a pair, and the rule by which it was split.

    Attributes:
        prompt_ids, chosen_ids, rejected_ids: token ids.
        merged: rule 2 was needed.
        rerendered: rule 3 was needed.
    """

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    merged: bool = False
    rerendered: bool = False

    @property
    def ids(self) -> tuple[Ids, Ids, Ids]:
        return self.prompt_ids, self.chosen_ids, self.rejected_ids

    @property
    def lengths(self) -> tuple[int, int, int]:
        return len(self.prompt_ids), len(self.chosen_ids), len(self.rejected_ids)


@dataclass(frozen=True, slots=True)
class PairTexts:
    """The texts of a pair that are to be tokenised.

    Attributes:
        prompt: the prompt.
        with_chosen, with_rejected: the prompt followed by each answer.
        rendered: a chat template made the texts, with all special tokens; otherwise they are
            plain, and the tokenizer's leading tokens (BOS) go before them unless already there.
    """

    prompt: str
    with_chosen: str
    with_rejected: str
    rendered: bool = False

    @property
    def wholes(self) -> tuple[str, str]:
        """The prompt followed by each answer."""
        return self.with_chosen, self.with_rejected


class BoundaryTokenizer:
    """Tokenises pairs and splits them at the end of the prompt, with any tokenizer."""

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

    def split(self, pairs: Sequence[PairTexts]) -> list[SplitPair]:
        """Tokenise and split each pair."""
        # One call for all texts: fast tokenizers work on a batch in parallel.
        ids = self.encode(
            [text for p in pairs for text in (p.prompt, p.with_chosen, p.with_rejected)]
        )
        triples = zip(ids[0::3], ids[1::3], ids[2::3], strict=True)
        return [self._split(texts, *triple) for texts, triple in zip(pairs, triples, strict=True)]

    def _split(self, texts: PairTexts, *triple: Ids) -> SplitPair:
        if not texts.rendered:
            triple = tuple(map(self._with_leading, triple))
        prompt, chosen, rejected = triple
        size = len(prompt)
        # Rule 1
        if chosen[:size] == prompt == rejected[:size]:
            return SplitPair(prompt, chosen[size:], rejected[size:])
        wholes = texts.wholes
        # Rule 3: the ids differ because the texts do, not because of a merge.
        if not all(whole.startswith(texts.prompt) for whole in wholes):
            return _split_at_common_prefix(prompt, chosen, rejected, rerendered=True)
        # Rule 2
        answers = [
            self._after(prompt, ids, whole[len(texts.prompt) :])
            for ids, whole in zip((chosen, rejected), wholes, strict=True)
        ]
        if answers[0] is None or answers[1] is None:
            return _split_at_common_prefix(prompt, chosen, rejected, merged=True)
        return SplitPair(prompt, answers[0], answers[1], merged=True)

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
    prompt: Ids, chosen: Ids, rejected: Ids, *, merged: bool = False, rerendered: bool = False
) -> SplitPair:
    size = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
    return SplitPair(prompt[:size], chosen[size:], rejected[size:], merged, rerendered)
