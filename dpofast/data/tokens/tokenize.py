"""Rows in the normal form -> token ids with an exact boundary, cut to length."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import datasets
import pyarrow as pa

from dpofast.columns import (
    LABEL_COLUMN,
    PAIRED,
    RANKED,
    REF_COLUMNS,
    TIES_COLUMN,
    WEIGHT_COLUMNS,
    RowKind,
    kind_of_columns,
)
from dpofast.data.reading.bad_rows import check_strictness
from dpofast.data.reading.normal_form import is_normal_form, source_notes
from dpofast.data.reading.preferences import load_preferences
from dpofast.data.reading.reasons import EMPTY
from dpofast.data.reading.records import place_of_row
from dpofast.data.reading.row_error import STRICT_REMEDY, RowError
from dpofast.data.tokens.boundary import BoundaryTokenizer, RowTexts, SplitRow
from dpofast.data.tokens.left_out import NO_ROOM, reason_left_out
from dpofast.data.tokens.outcome import (
    Outcome,
    OutcomeSums,
    RowOutcome,
    bad_row,
    is_kept,
    outcome_features,
)
from dpofast.data.tokens.refusals import (
    refuse_bad_rows,
    refuse_nothing_kept,
    warn_of_rerendered_prompts,
)
from dpofast.data.tokens.render import TokenizerError
from dpofast.data.tokens.render_process import RowRenderer
from dpofast.data.tokens.report import PreparationReport
from dpofast.data.tokens.row_parts import row_parts
from dpofast.data.tokens.truncate import Cut, LengthLimits
from dpofast.data.tokens.unused import unused_parts, warn_of_missing_text
from dpofast.errors import ConfigError, DataError

TOKENISED_ROWS = 256  # that are tokenised at a time
# Columns of the normal form that outcomes keep.
_PASSED_ON = ("row", "source", LABEL_COLUMN, TIES_COLUMN, *REF_COLUMNS, *WEIGHT_COLUMNS)


def tokenize_preferences(
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
) -> tuple[datasets.Dataset, PreparationReport]:
    """Tokenise pairs, split prompts from answers, cut to length, and leave out useless pairs.

    Args:
        dataset: pairs; if they aren't in the normal form, `load_preferences` reads them first.
        tokenizer: a transformers tokenizer; can be None if the pairs are tokenised already.
        max_length: most tokens in a prompt and one answer; None for no limit.
        truncation_mode: keep_start cuts answers on the right, and leaves out a pair whose prompt
            fills max_length; keep_end first cuts the prompt on its left.
        max_prompt_length: most tokens in a prompt, which is cut on its left; None for no limit.
        max_completion_length: most tokens in an answer, which is cut on its right; None for no
            limit. max_length applies to what these two leave.
        strict: raise at a pair that would be left out.
        skip_bad_rows: leave out rows that can't be used, and report them, instead of raising.
        num_proc: number of processes that tokenise; None tokenises in this one.
        name: dataset name, used in errors and in the report.
    Returns:
        A Dataset in memory and the report. The Dataset has int lists prompt_ids, chosen_ids and
        rejected_ids; int `row`, the index in the source from 0; and ref_chosen_logps,
        ref_rejected_logps, weight and label_confidence, if the source has them.
    Raises:
        DataError: some rows can't be used. Names the dataset and the first ten rows, and says what
            is wrong and what to do. Or the rows are ranked, which `tokenize_ranked` tokenises.
        ConfigError: both strict and skip_bad_rows are set, or a length, truncation_mode or
            num_proc can't be used.
    """
    limits = LengthLimits(max_length, truncation_mode, max_prompt_length, max_completion_length)
    check_strictness(strict, skip_bad_rows)
    if not is_normal_form(dataset):
        dataset = load_preferences(dataset, strict=strict, skip_bad_rows=skip_bad_rows, name=name)
    if kind_of_columns(dataset.column_names) is RANKED:
        raise DataError(
            f"{name} has rows with many answers; tokenise them with tokenize_ranked of dpofast.data"
        )
    return tokenize_rows(
        dataset,
        tokenizer,
        PAIRED,
        limits,
        strict=strict,
        skip_bad_rows=skip_bad_rows,
        num_proc=num_proc,
        name=name,
    )


def tokenize_rows(
    dataset: datasets.Dataset,
    tokenizer: Any,
    kind: RowKind,
    limits: LengthLimits,
    *,
    strict: bool,
    skip_bad_rows: bool,
    num_proc: int | None,
    name: str,
) -> tuple[datasets.Dataset, PreparationReport]:
    """Tokenise rows of one kind; `tokenize_preferences` and `tokenize_unpaired` say the rest.

    Args:
        dataset: rows in the normal form.
        kind: what they are.
        limits: the options that decide what is cut.
    """
    tokenize = RowTokenizer(RowRenderer(tokenizer), limits, strict, name, kind)
    table, report = outcomes_and_report(
        dataset, tokenize, skip_bad_rows=skip_bad_rows, num_proc=num_proc
    )
    passed_on = [c for c in table.column_names if c not in tokenize.features]
    table = table.filter(is_kept(table)).select([*kind.id_columns, *passed_on])
    return datasets.Dataset(table), report


def outcomes_and_report(
    dataset: datasets.Dataset,
    tokenize: RowTokenizer,
    *,
    skip_bad_rows: bool,
    num_proc: int | None,
) -> tuple[pa.Table, PreparationReport]:
    """Tokenise rows, and report what became of them.

    Args:
        dataset: rows in the normal form.
        tokenize: tokenises them; its renderer is closed.
        skip_bad_rows, num_proc: as in `tokenize_preferences`.
    Returns:
        The table of outcomes, with the columns that are passed on; and the report.
    """
    if num_proc is not None and (not isinstance(num_proc, int) or num_proc < 1):
        raise ConfigError(f"dataset_num_proc is {num_proc!r}, expected an integer of at least 1")
    name = tokenize.name
    if not len(dataset):
        raise DataError(f"{name} holds no {tokenize.kind.noun}s; give it at least one")
    with contextlib.closing(tokenize.renderer) as renderer:
        warn_of_missing_text(dataset, renderer, name)
        outcomes = _outcomes_of(dataset, tokenize, num_proc)
        unused = unused_parts(dataset, renderer)
    table = outcomes.with_format("arrow")[:]
    nulls = source_notes(dataset).nulls_left_out
    report = tokenize.sums(table).report(name, tokenize.limits, unused, nulls)
    if not skip_bad_rows:
        refuse_bad_rows(name, table)
    refuse_nothing_kept(report)
    warn_of_rerendered_prompts(report)
    return table, report


def _outcomes_of(
    dataset: datasets.Dataset, tokenize: RowTokenizer, num_proc: int | None
) -> datasets.Dataset:
    """The outcomes of all rows, and the columns that are passed on."""
    passed_on = {
        column: dataset.features[column] for column in _PASSED_ON if column in dataset.column_names
    }
    return dataset.map(
        tokenize,
        batched=True,
        batch_size=TOKENISED_ROWS,
        remove_columns=[c for c in dataset.column_names if c not in passed_on],
        features=datasets.Features({**passed_on, **tokenize.features}),
        num_proc=num_proc if num_proc is None else min(num_proc, len(dataset)),
        # Nothing is written to disk, so a file of an earlier run can't be taken for this result.
        keep_in_memory=True,
        load_from_cache_file=False,
        desc=f"Tokenising {tokenize.name}",
    )


def split_row(row: Mapping[str, Any], tokenizer: Any) -> SplitRow:
    """Tokenise one row of the normal form without any cut, for display.

    Raises:
        DataError: the row has no answers, or can't be tokenised.
    """
    kind = kind_of_columns(row)
    with contextlib.closing(RowRenderer(tokenizer)) as renderer:
        return RowTokenizer(renderer, LengthLimits(), False, kind.noun, kind).split(row)


class RowTokenizer:
    """Tokenises and cuts batches of rows; `Dataset.map` calls it with columns.

    It takes the arguments of `tokenize_preferences`, those about lengths as LengthLimits, and the
    tokenizer as a RowRenderer. `kind` says what the rows are.
    """

    def __init__(
        self,
        renderer: RowRenderer,
        limits: LengthLimits,
        strict: bool,
        name: str,
        kind: RowKind = PAIRED,
    ) -> None:
        self.renderer, self.tokenizer, self.limits = renderer, renderer.tokenizer, limits
        self.strict, self.name, self.kind = strict, name, kind

    @property
    def features(self) -> dict[str, Any]:
        """Column of an outcome -> its type in `datasets`."""
        return outcome_features(self.kind)

    def sums(self, table: pa.Table) -> OutcomeSums:
        """What became of the rows in a table of outcomes."""
        return OutcomeSums(table, kind=self.kind)

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns of the normal form -> columns `features`.

        Raises:
            DataError: the tokenizer can't tokenise any such row, or strict refuses a row.
        """
        rows = _rows_of(batch)
        outcomes = [self._left_out(row) for row in rows]
        waiting = [index for index, outcome in enumerate(outcomes) if outcome is None]
        for index, split in zip(waiting, self._split([rows[i] for i in waiting]), strict=True):
            outcomes[index] = self._outcome(split, rows[index])
        columns = [outcome.columns(self.kind) for outcome in outcomes if outcome is not None]
        return {c: [each[c] for each in columns] for c in self.features}

    def split(self, row: Mapping[str, Any]) -> SplitRow:
        """Token ids of a row before any cut.

        Raises:
            DataError: the row has no answers, or can't be tokenised.
        """
        if row.get("left_out"):
            if row.get("problem"):
                raise DataError(row["problem"])
            raise self._at_row(row, RowError(f"left out of training: {row['left_out']}"))
        (split,) = self._split([row])
        if isinstance(split, RowError):
            raise self._at_row(row, split)
        return split

    def _left_out(self, row: Mapping[str, Any]) -> Outcome | None:
        """The outcome of a row that was left out when the data was read; None for other rows."""
        reason = row.get("left_out")
        if not reason:
            return None
        if self.strict:
            raise self._at_row(row, self._refusal(reason, 0))
        return RowOutcome(None, None, reason, row.get("problem"))

    def _split(self, rows: Sequence[Mapping[str, Any]]) -> list[SplitRow | RowError]:
        """Token ids of each row before any cut, or what is wrong with the row."""
        is_tokenised = any(self.kind.id_columns[0] in row for row in rows)
        if is_tokenised:
            parts = [row_parts(row, self.kind) for row in rows]
            splits = [SplitRow(prompt, tuple(answers)) for prompt, *answers in parts]
            return [self._checked(split, is_tokenised) for split in splits]
        texts = self._rendered(rows)
        good = [text for text in texts if isinstance(text, RowTexts)]
        split_texts = iter(BoundaryTokenizer(self.tokenizer).split(good) if good else ())
        return [
            text if isinstance(text, RowError) else self._checked(next(split_texts), is_tokenised)
            for text in texts
        ]

    def _rendered(self, rows: Sequence[Mapping[str, Any]]) -> list[RowTexts | RowError]:
        """The texts of each row, or what is wrong with the row."""
        if not rows:
            return []
        if self.tokenizer is None:
            raise DataError(f"{self.name} is not tokenised yet and there is no tokenizer; give one")
        texts = self.renderer.all_texts(rows)
        if isinstance(texts[-1], TokenizerError):
            raise self._at_row(rows[len(texts) - 1], texts[-1])
        return texts

    def _checked(self, split: SplitRow, is_tokenised: bool) -> SplitRow | RowError:
        """The token ids of a row, or what is wrong with them."""
        if not split.prompt_ids:
            return RowError(
                "the prompt has no token, so nothing predicts an answer's first token; give a "
                "prompt, or a tokenizer that begins every text with a BOS token"
            )
        if is_tokenised and self.tokenizer is not None:
            largest = max(map(max, split.ids))
            if largest > self._last_id:
                return RowError(
                    f"token id {largest} is beyond {self._last_id}, the tokenizer's last; tokenise "
                    "with the tokenizer of this model"
                )
        return split

    @cached_property
    def _last_id(self) -> int:
        # len(tokenizer) would be too small if there are gaps between the ids.
        return max(self.tokenizer.get_vocab().values())

    def _outcome(self, split: SplitRow | RowError, row: Mapping[str, Any]) -> Outcome:
        if isinstance(split, RowError):
            return bad_row(str(self._at_row(row, split)))
        cut = self.limits.plan_cut(*split.lengths)
        return RowOutcome(split, cut, self._reason(split, cut, row))

    def _reason(self, split: SplitRow, cut: Cut, row: Mapping[str, Any]) -> str | None:
        """Why answers of a row are left out; None if they aren't.

        Args:
            split: the prompt with these answers, before the cut.
            cut: what they lose.
            row: the row.
        Raises:
            DataError: they are left out, and strict refuses that.
        """
        reason = reason_left_out(split.answers, cut)
        # A text that becomes only EOS is an empty answer. Someone who gives the ids themselves may
        # want just EOS.
        is_tokenised = self.kind.id_columns[0] in row
        empty = [[]] if is_tokenised else [[], [self.tokenizer.eos_token_id]]
        if any(answer in empty for answer in split.answers):
            reason = EMPTY
        if reason is not None and self.strict:
            raise self._at_row(row, self._refusal(reason, len(split.prompt_ids)))
        return reason

    def _refusal(self, reason: str, prompt_length: int) -> RowError:
        if reason == NO_ROOM:
            limits = self.limits
            shorter = "lower" if limits.max_prompt_length else "set"
            return RowError(
                f"the prompt has {prompt_length} tokens, which leaves no room for an answer in "
                f"{limits}; raise max_length, {shorter} max_prompt_length, or use truncation_mode "
                "keep_end"
            )
        what = "an empty answer" if reason == EMPTY else reason
        return RowError(f"the {self.kind.noun} has {what}; {STRICT_REMEDY}")

    def _at_row(self, row: Mapping[str, Any], error: RowError) -> DataError:
        return DataError(f"{place_of_row(row.get('source') or self.name, row['row'])}: {error}")


def _rows_of(batch: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
