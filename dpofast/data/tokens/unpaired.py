"""Unpaired rows in the normal form -> token ids with an exact boundary, cut to length."""

from __future__ import annotations

from typing import Any

import datasets

from dpofast.columns import LABEL_COLUMN, UNPAIRED
from dpofast.data.reading.bad_rows import check_strictness
from dpofast.data.reading.normal_form import is_normal_form
from dpofast.data.reading.preferences import load_unpaired
from dpofast.data.tokens.report import PreparationReport
from dpofast.data.tokens.tokenize import tokenize_rows
from dpofast.data.tokens.truncate import LengthLimits
from dpofast.errors import DataError


def tokenize_unpaired(
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
    """Tokenise unpaired rows, split prompts from answers, cut to length, leave out useless rows.

    A prompt and an answer get the ids that `tokenize_preferences` gives them in a pair, unless the
    pair's other answer moves the end of their prompt or its cut; see `split_pairs`.

    Args:
        dataset: unpaired rows; if they aren't in the normal form, `load_unpaired` reads them first.
        tokenizer, max_length, truncation_mode, max_prompt_length, max_completion_length, strict,
            skip_bad_rows, num_proc, name: as in `tokenize_preferences`.
    Returns:
        A Dataset in memory and the report. The Dataset has int lists prompt_ids and completion_ids;
        bool `label`, true for a desirable answer; and int `row`, the index in the source from 0.
    Raises:
        DataError, ConfigError: as in `tokenize_preferences`.
    """
    limits = LengthLimits(max_length, truncation_mode, max_prompt_length, max_completion_length)
    check_strictness(strict, skip_bad_rows)
    if not is_normal_form(dataset, UNPAIRED):
        dataset = load_unpaired(dataset, strict=strict, skip_bad_rows=skip_bad_rows, name=name)
    return tokenize_rows(
        dataset,
        tokenizer,
        UNPAIRED,
        limits,
        strict=strict,
        skip_bad_rows=skip_bad_rows,
        num_proc=num_proc,
        name=name,
    )


def refuse_one_label(rows: datasets.Dataset, name: str) -> None:
    """Raise DataError if all rows are desirable, or all undesirable: KTO compares the two.

    Args:
        rows: unpaired rows in the normal form, or tokenised; with the column `label`, which is null
            for a row that is left out.
        name: name of the dataset.
    """
    labels = [label for label in rows[LABEL_COLUMN][:] if label is not None]
    if not labels or len(set(labels)) == 2:
        return
    found, missing = ("desirable", "undesirable") if labels[0] else ("undesirable", "desirable")
    raise DataError(
        f"{name}: all {len(labels)} rows are {found}, and KTO needs answers of both kinds; add "
        f"{missing} answers (label {str(not labels[0]).lower()})"
    )
