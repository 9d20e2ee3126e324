"""Splits a tokenised pair where the prompt ends, with the same prompt ids in both answers.

The rule, for the prompt's text p and an answer's text a:

1. Where tokens(p) begin tokens(p + a), as is usual, the answer is what follows.
2. Where the tokenizer merges the end of p with the beginning of a, the prompt keeps tokens(p), as
   it stands when the model generates, and the answer is tokenised by itself. A tokenizer that
   puts a blank before every text would change the answer so; then it is tokenised after a line
   break, and where that changes it too, by rule 3.
3. Where a chat template renders the prompt alone otherwise than before an answer, the prompt is
   what all three token sequences have in common, and the answers are the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpofast.data.prefix import common_prefix_length

Ids = list[int]


@dataclass(frozen=True, slots=True)
class SplitPair:
    """Token ids of a pair, and which rule was needed to split it."""

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    merged: bool = False
    rerendered: bool = False


@dataclass(frozen=True, slots=True)
class PairTexts:
    """What is tokenised of a pair: the prompt, and the prompt followed by each answer."""

    prompt: str
    with_chosen: str
    with_rejected: str


class BoundaryTokenizer:
    """A tokenizer, and the special tokens that it puts before every text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.leading_ids = self._leading_ids()

    def encode(self, texts: list[str]) -> list[Ids]:
        """Token ids of each text without added special tokens; those in the text are read."""
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[Ids] = encoded["input_ids"]
        return ids

    def split(self, pairs: Sequence[PairTexts], plain: bool) -> list[SplitPair]:
        """Tokenise and split pairs.

        Args:
            plain: text rather than a rendered chat template, so that the tokenizer's own leading
                tokens (BOS) go before it unless it begins with them.
        """
        texts = [text for p in pairs for text in (p.prompt, p.with_chosen, p.with_rejected)]
        ids = self.encode(texts)
        if plain:
            ids = [self._with_leading(sequence) for sequence in ids]
        triples = zip(ids[0::3], ids[1::3], ids[2::3], strict=True)
        return [self._split(p, *triple) for p, triple in zip(pairs, triples, strict=True)]

    def _split(self, texts: PairTexts, prompt: Ids, chosen: Ids, rejected: Ids) -> SplitPair:
        size = len(prompt)
        if chosen[:size] == prompt == rejected[:size]:
            return SplitPair(prompt, chosen[size:], rejected[size:])
        wholes = (texts.with_chosen, texts.with_rejected)
        if not all(whole.startswith(texts.prompt) for whole in wholes):
            return _split_common(prompt, chosen, rejected, rerendered=True)
        answers = [
            self._after(prompt, ids, whole[len(texts.prompt) :])
            for ids, whole in zip((chosen, rejected), wholes, strict=True)
        ]
        if answers[0] is None or answers[1] is None:
            return _split_common(prompt, chosen, rejected, merged=True)
        return SplitPair(prompt, answers[0], answers[1], merged=True)

    def _after(self, prompt: Ids, whole: Ids, answer: str) -> Ids | None:
        """The answer's ids after exactly `prompt`; None where no way keeps its text."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        text = self._decode(whole)
        anchor, alone, anchored = self.encode(["\n", answer, "\n" + answer])
        if self._decode(prompt + alone) == text:
            return alone
        rest = anchored[len(anchor) :]
        if anchored[: len(anchor)] == anchor and self._decode(prompt + rest) == text:
            return rest
        # Splitting in common needs a token to start from; without one, the words stay whole.
        return alone if alone and not common_prefix_length(prompt, whole) else None

    def _decode(self, ids: Ids) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _leading_ids(self) -> Ids:
        """Found by a probe: tokenizers have no common way to ask for them."""
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


def _split_common(
    prompt: Ids, chosen: Ids, rejected: Ids, merged: bool = False, rerendered: bool = False
) -> SplitPair:
    size = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
    return SplitPair(prompt[:size], chosen[size:], rejected[size:], merged, rerendered)
