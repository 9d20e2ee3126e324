"""Finds the name that a misspelt one means; a name that only looks similar is none."""

from __future__ import annotations

import re
from collections.abc import Iterable

# A word with fewer letters than this must be spelt right: one letter changes its meaning.
_SHORTEST_TYPO = 3
# From this length on, a word may have two typos.
_LONG_WORD = 8


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is a misspelling of.

    Letters may be swapped, missing, doubled or wrong: one in a word, two in a word of 8 letters or
    more. The first letter and all digits must be right. Capitals and separators don't count, so
    `maxLength` is read as `max_length`. Words that are missing or added make another name: a hint
    from `lora_task_type` to `loss_type` would be wrong.

    Args:
        name: name as the user wrote it.
        known: names that exist, the most likely ones first.

    Returns:
        The name with the fewest typos, None if there is none.
    """
    words = _words(name)
    best, fewest = None, None
    for candidate in known:
        typos = _typos(words, _words(candidate))
        if typos is not None and (fewest is None or typos < fewest):
            best, fewest = candidate, typos
    return best


def _words(name: str) -> list[str]:
    """The words and numbers in a name, in lower case."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return re.findall(r"[^\W\d_]+|\d+", spaced)


def _typos(given: list[str], known: list[str]) -> int | None:
    """How many letters are wrong; None if the words aren't the same ones misspelt."""
    if "".join(given) == "".join(known):
        return 0
    most = 2
    if len(given) != len(known):  # a separator is missing or added, which is a typo, too
        given, known, most = ["".join(given)], ["".join(known)], 1
    total = 0
    for word, right in zip(given, known, strict=True):
        if word == right:
            continue
        allowed = 0 if len(right) < _SHORTEST_TYPO else 1 if len(right) < _LONG_WORD else most
        if not right.isalpha() or not _begin_alike(word, right):
            return None
        if abs(len(word) - len(right)) > allowed or _distance(word, right) > allowed:
            return None
        total += _distance(word, right)
    return total


def _begin_alike(word: str, right: str) -> bool:
    """Whether the first letters agree, or are swapped: `eta` is not a misspelt `beta`."""
    return word[:1] == right[:1] or word[:2] == right[1::-1]


def _distance(first: str, second: str) -> int:
    """The optimal string alignment distance: letters added, missing, wrong, or two swapped."""
    rows = [list(range(len(second) + 1))]
    for i, letter in enumerate(first, start=1):
        row = [i]
        for j, other in enumerate(second, start=1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == other:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]
