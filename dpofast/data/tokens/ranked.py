"""Rows with many answers in the normal form -> token ids, each answer once, and pairs of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpofast.columns import PAIRS_COLUMN, PLACES_COLUMN, RANKED, SOURCE_COLUMN, WEIGHT_COLUMNS
from dpofast.data.reading.bad_rows import check_strictness
from dpofast.data.reading.reasons import BAD_ROW
from dpofast.data.reading.row_error import RowError
from dpofast.data.tokens.boundary import SplitRow
from dpofast.data.tokens.outcome import Outcome
from dpofast.data.tokens.pooled import ANSWER, PLACE, PROMPT, PooledPairs
from dpofast.data.tokens.ranked_outcome import RankedOutcome, RankedSums, ranked_features
from dpofast.data.tokens.render_process import RowRenderer
from dpofast.data.tokens.report import PreparationReport
from dpofast.data.tokens.tokenize import RowTokenizer, outcomes_and_report
from dpofast.data.tokens.truncate import Cut, LengthLimits

_PART_ROWS = 1000  # that are put into one chunk of a table


def tokenize_ranked(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    strict: bool = False,
    skip_bad_rows: bool = False,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[PooledPairs, PreparationReport]:
    """Tokenise rows with many answers, each answer once, and leave out useless pairs.

    A pair gets the ids that `tokenize_preferences` gives it, unless other answers of its row move
    the end of the prompt or its cut: all answers of a row have the same prompt ids. So under
    truncation_mode keep_end the prompt is cut by what the row's longest answer needs, and where a
    template renders the prompt in two ways, or the tokenizer merges it with an answer, it ends at
    the same place for all of them.

    A pair of answers that are identical, also after the cut, or of which one is empty, is left out
    alone; a row whose prompt leaves no room is left out with all its pairs.

    Args:
        dataset: ranked rows in the normal form, from `load_preferences`.
        tokenizer, max_length, truncation_mode, max_prompt_length, max_completion_length, strict,
            skip_bad_rows, num_proc, name: as in `tokenize_preferences`.
    Returns:
        The pairs, and the report. The pairs are in the order of the rows, and of a row's pairs.
    Raises:
        DataError, ConfigError: as in `tokenize_preferences`.
    """
    limits = LengthLimits(max_length, truncation_mode, max_prompt_length, max_completion_length)
    check_strictness(strict, skip_bad_rows)
    tokenize = RankedTokenizer(RowRenderer(tokenizer), limits, strict, name, RANKED)
    table, report = outcomes_and_report(
        dataset, tokenize, skip_bad_rows=skip_bad_rows, num_proc=num_proc
    )
    return _pooled(table), report


class RankedTokenizer(RowTokenizer):
    """Tokenises and cuts batches of ranked rows; the arguments are those of RowTokenizer."""

    @property
    def features(self) -> dict[str, Any]:
        return ranked_features()

    def sums(self, table: pa.Table) -> RankedSums:
        return RankedSums(table)

    def _left_out(self, row: Mapping[str, Any]) -> Outcome | None:
        if super()._left_out(row) is None:
            return None
        problem = row.get("problem")
        return RankedOutcome(None, Cut.nothing(0), (), (row["left_out"],), problem=problem)

    def _outcome(self, split: SplitRow | RowError, row: Mapping[str, Any]) -> Outcome:
        pairs = row[PAIRS_COLUMN]
        if isinstance(split, RowError):
            problem = str(self._at_row(row, split))
            all_bad = (BAD_ROW,) * len(pairs)
            return RankedOutcome(None, Cut.nothing(0), (), all_bad, problem=problem)
        cut = self.limits.plan_cut(*split.lengths)
        kept, reasons = [], []
        for pair in pairs:
            alone = SplitRow(split.prompt_ids, tuple(split.answers[place] for place in pair))
            reason = self._reason(alone, cut.of_answers(pair), row)
            if reason is None:
                kept.append(pair)
            else:
                reasons.append(reason)
        return RankedOutcome(split, cut, kept, reasons, row[PLACES_COLUMN])


def _pooled(outcomes: pa.Table) -> PooledPairs:
    """The kept pairs of a table of outcomes."""
    answers, index, columns = [], [], []
    first = 0
    # In parts, as the ids of all answers with their prompts can be more than a list of Arrow holds.
    for batch in outcomes.to_batches(max_chunksize=_PART_ROWS):
        own_answers, own_index, own_columns = _pooled_part(batch)
        answers.append(own_answers)
        index.append(own_index + first)
        columns.append(own_columns)
        first += len(own_answers)
    table = pa.concat_tables(columns).combine_chunks()
    return PooledPairs(datasets.Dataset(pa.concat_tables(answers)), np.concatenate(index), table)


def _pooled_part(rows: pa.RecordBatch) -> tuple[pa.Table, np.ndarray, pa.Table]:
    """The answers of some rows, the pairs as places among these, and the columns of the pairs."""
    given = [c for c in (SOURCE_COLUMN, *WEIGHT_COLUMNS) if c in rows.schema.names]
    of_row = {name: rows[name] for name in ("row", *given)}
    num_pairs, num_answers = (
        pc.list_value_length(rows[name]).to_numpy() for name in ("pairs", "completions_ids")
    )
    numbers = np.arange(len(rows))
    to_answers, to_pairs = (pa.array(np.repeat(numbers, n)) for n in (num_answers, num_pairs))
    of_answers = {
        PROMPT: rows["prompt_ids"].take(to_answers),
        ANSWER: pc.list_flatten(rows["completions_ids"]),
        PLACE: pc.list_flatten(rows["completions"]),
        **{n: of_row[n].take(to_answers) for n in ("row", SOURCE_COLUMN) if n in of_row},
    }
    places = pc.list_flatten(pc.list_flatten(rows["pairs"])).to_numpy().reshape(-1, 2)
    starts = np.cumsum(num_answers) - num_answers
    index = places.astype(np.int64) + np.repeat(starts, num_pairs)[:, None]
    columns = {name: column.take(to_pairs) for name, column in of_row.items()}
    return pa.table(of_answers), index, pa.table(columns)
