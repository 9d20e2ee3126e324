"""Says which answers of a prompt are compared, from their scores, their ranks or preferences."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpofast.data.reading.row_error import RowError, naming, shown
from dpofast.data.reading.weights import number_in
from dpofast.errors import ConfigError

ALL, BEST_WORST, ADJACENT, GIVEN = "all", "best_worst", "adjacent", "given"
ANSWER_PAIRS = (ALL, BEST_WORST, ADJACENT, GIVEN)
SCORES, RANKS, PREFERENCES = "scores", "ranks", "preferences"
RANKINGS = (SCORES, RANKS, PREFERENCES)  # columns that say which answers are better than others

IndexPairs = list[tuple[int, int]]  # chosen and rejected, places in the answers of a row


@dataclass(frozen=True, slots=True)
class AnswerPairs:
    """The pairs of one row.

    Attributes:
        how: which pairs were made, one of ANSWER_PAIRS.
        column: what says so, one of RANKINGS.
        pairs: chosen and rejected answer of each pair, at least one.
        ties: pairs that equal scores leave unmade.
    """

    how: str
    column: str
    pairs: IndexPairs
    ties: int = 0


def check_answer_pairs(answer_pairs: Any) -> None:
    """Raise ConfigError unless this is None or one of ANSWER_PAIRS."""
    if answer_pairs is not None and answer_pairs not in ANSWER_PAIRS:
        raise ConfigError(
            f"answer_pairs: got {answer_pairs!r}, expected one of {', '.join(ANSWER_PAIRS)}."
        )


def answer_pairs_of(
    row: Mapping[str, Any], num_answers: int, answer_pairs: str | None
) -> AnswerPairs:
    """The pairs of a row.

    Args:
        row: the row's columns, of which exactly one of RANKINGS holds something.
        num_answers: answers of the row.
        answer_pairs: which pairs to make, one of ANSWER_PAIRS; None for `given` where the row has
            preferences, otherwise `all`.
    Raises:
        RowError: no pairs can be made; says why and what to do.
    """
    column = _ranking_of(row)
    if num_answers < 2:
        raise RowError(
            f"completions has {num_answers or 'no'} answer{'s' * (num_answers != 1)}, and a pair "
            "needs two; add an answer or remove the row"
        )
    _refuse_contradiction(column, answer_pairs)
    if column == PREFERENCES:
        pairs = _preferences(row[column], num_answers)
        return AnswerPairs(GIVEN, column, pairs)
    how = answer_pairs or ALL
    numbers = _numbers(row[column], column, num_answers)
    if len(set(numbers)) == 1:
        raise RowError(
            f"all {column} are {numbers[0]:g}, so no answer is better than another; remove the row"
        )
    scores = [-number for number in numbers] if column == RANKS else numbers
    if how == BEST_WORST:
        # Equal scores leave nothing unmade: the first of the best meets the first of the worst.
        ends = scores.index(max(scores)), scores.index(min(scores))
        return AnswerPairs(how, column, [ends])
    pairs = _by_score(scores, only_adjacent=how == ADJACENT)
    ties = sum(math.comb(count, 2) for count in Counter(scores).values())
    return AnswerPairs(how, column, pairs, ties)


def _by_score(scores: Sequence[float], only_adjacent: bool) -> IndexPairs:
    """The better and the worse answer of all pairs with different scores, in the answers' order.

    Args:
        scores: higher is better.
        only_adjacent: keep pairs with no other score between theirs.
    """
    levels = {score: level for level, score in enumerate(sorted(set(scores)))}
    heights = [levels[score] for score in scores]
    return [
        (first, second) if heights[first] > heights[second] else (second, first)
        for first, second in itertools.combinations(range(len(scores)), 2)
        if (apart := abs(heights[first] - heights[second])) == 1 or (apart and not only_adjacent)
    ]


def _ranking_of(row: Mapping[str, Any]) -> str:
    """The column that says which answers are better."""
    found = [column for column in RANKINGS if not _is_absent(row.get(column))]
    if len(found) == 1:
        return found[0]
    if found:
        raise RowError(
            f"the row has {' and '.join(found)}, and one of them says which answers are better; "
            "keep one"
        )
    nulls = [column for column in RANKINGS if column in row]
    what = (
        f"{' and '.join(nulls)} {'is' if len(nulls) == 1 else 'are'} null"
        if nulls
        else "the row has completions"
    )
    naming_scores = f"name yours with {naming('columns', {SCORES: 'your_column'})}"
    raise RowError(
        f"{what}, and nothing says which answers are better; add scores (higher is better), ranks "
        "(1 is best) or preferences ([[chosen, rejected], ...], counted from 0), or "
        f"{'remove the row' if nulls else naming_scores}"
    )


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())  # in CSV files


def _refuse_contradiction(column: str, answer_pairs: str | None) -> None:
    """Refuse an option that the row's column can't serve."""
    if answer_pairs is None or (answer_pairs == GIVEN) == (column == PREFERENCES):
        return
    if column == PREFERENCES:
        raise RowError(
            f"the row has preferences, which are its pairs, but answer_pairs is {answer_pairs}; "
            "leave the option out, or give scores or ranks"
        )
    raise RowError(
        f"answer_pairs is {GIVEN}, but the row has {column} and no preferences; leave the option "
        f"out, or choose one of {', '.join(ANSWER_PAIRS[:-1])}"
    )


def _numbers(value: Any, column: str, num_answers: int) -> list[float]:
    """The scores or ranks of all answers."""
    given = value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor
    if not isinstance(given, list | tuple):
        raise RowError(f"{column} is not a list of numbers but {shown(value)}; give one per answer")
    if len(given) != num_answers:
        raise RowError(
            f"{column} has {len(given)} numbers, but completions has {num_answers} answers; give "
            "each answer one"
        )
    numbers = [number_in(item) for item in given]
    for index, (item, number) in enumerate(zip(given, numbers, strict=True)):
        if not math.isfinite(number):
            found = "null" if item is None else shown(item)
            raise RowError(
                f"{column}[{index}] is {found}, expected a finite number; mend it, or remove the "
                "answer with its number"
            )
        if column == RANKS and number < 0:
            raise RowError(
                f"{column}[{index}] is {shown(item)}, but a rank is never below 0 and the lowest "
                "is the best; give scores if higher is better"
            )
    return numbers


def _preferences(value: Any, num_answers: int) -> IndexPairs:
    """The pairs that a row gives itself."""
    given = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(given, list | tuple):
        raise RowError(
            f"{PREFERENCES} is not a list of [chosen, rejected] but {shown(value)}; write "
            "[[0, 1], ...], which answer is better than which, counted from 0"
        )
    if not given:
        raise RowError(f"{PREFERENCES} is empty, so the row has no pair; add one or remove the row")
    return [_preference(item, index, num_answers) for index, item in enumerate(given)]


def _preference(value: Any, index: int, num_answers: int) -> tuple[int, int]:
    name = f"{PREFERENCES}[{index}]"
    pair = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise RowError(
            f"{name} is not [chosen, rejected] but {shown(value)}; write two places in "
            "completions, counted from 0"
        )
    pair = [place.item() if hasattr(place, "item") else place for place in pair]  # of numpy
    for place in pair:
        is_place = isinstance(place, int) and not isinstance(place, bool)
        if not is_place or not 0 <= place < num_answers:
            raise RowError(
                f"{name} is {shown(pair)}, but {shown(place)} names no answer: completions has "
                f"{num_answers}, counted from 0 to {num_answers - 1}; mend it"
            )
    chosen, rejected = pair
    if chosen == rejected:
        raise RowError(
            f"{name} is {shown(pair)}, which compares an answer with itself; mend or remove it"
        )
    return chosen, rejected
