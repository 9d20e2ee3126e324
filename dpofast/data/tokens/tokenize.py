"""Preference pairs in the normal form -> token ids with an exact boundary, cut to length."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

from dpofast.columns import ID_COLUMNS, REF_COLUMNS
from dpofast.data.reading.preferences import is_normal_form, load_preferences
from dpofast.data.reading.row_error import RowError
from dpofast.data.tokens.boundary import BoundaryTokenizer, SplitPair
from dpofast.data.tokens.render import render_pair_texts
from dpofast.data.tokens.report import (
    IDENTICAL,
    IDENTICAL_CUT,
    NO_ROOM,
    REASONS,
    Lengths,
    PreparationReport,
)
from dpofast.data.tokens.truncate import Cut, check_truncation, plan_cut
from dpofast.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_IDS = datasets.List(datasets.Value("int32"))
_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class PreparedPair:
    """One pair with what was done to it; the ids are empty where it is left out.

    Attributes:
        reason: 0 where the pair is kept, otherwise 1 + its index in REASONS.
        prompt_length, chosen_length, rejected_length: tokens before the cut.
        prompt_cut, chosen_cut, rejected_cut: tokens cut.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    reason: int
    prompt_length: int
    chosen_length: int
    rejected_length: int
    prompt_cut: int
    chosen_cut: int
    rejected_cut: int
    merged: bool
    rerendered: bool


_FEATURES = {
    **dict.fromkeys(ID_COLUMNS, _IDS),
    "reason": datasets.Value("int8"),
    **{
        f"{part}_{what}": datasets.Value("int32")
        for what in ("length", "cut")
        for part in ("prompt", "chosen", "rejected")
    },
    **dict.fromkeys(("merged", "rerendered"), datasets.Value("bool")),
}


def tokenize_preferences(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    strict: bool = False,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[datasets.Dataset, PreparationReport]:
    """Tokenise pairs, split them where the prompt ends, cut them, leave out what can't teach.

    Args:
        dataset: pairs in the normal form; any other is brought to it first.
        tokenizer: a transformers tokenizer; None will do for pairs that are tokenised already.
        max_length: most tokens of a prompt and one answer, None for no limit.
        truncation_mode: keep_start cuts answers on the right, and leaves out a pair whose prompt
            leaves no room for a token of each; keep_end first cuts the prompt on the left.
        strict: stop at a pair that would be left out.
        num_proc: processes to tokenise with.
        name: the dataset's name in errors and in the report.
    Returns:
        A Dataset in memory with int lists prompt_ids, chosen_ids and rejected_ids, int `row` (the
        index in the source, from 0) and, where given, ref_chosen_logps and ref_rejected_logps;
        and the report.
    Raises:
        DataError: names the dataset and the row, what is wrong and what to do.
        ConfigError: max_length, truncation_mode or num_proc can't be used.
    """
    check_truncation(max_length, truncation_mode)
    if num_proc is not None and (not isinstance(num_proc, int) or num_proc < 1):
        raise ConfigError(f"dataset_num_proc is {num_proc!r}, expected an integer of at least 1")
    if not is_normal_form(dataset):
        dataset = load_preferences(dataset, strict=strict, name=name)
    if not len(dataset):
        raise DataError(f"{name} holds no pairs; give it at least one")
    prepare = _Preparer(tokenizer, max_length, truncation_mode, strict, name)
    kept = {c: dataset.features[c] for c in ("row", *REF_COLUMNS) if c in dataset.column_names}
    prepared = dataset.map(
        prepare,
        batched=True,
        batch_size=_BATCH_ROWS,
        remove_columns=[c for c in dataset.column_names if c not in kept],
        features=datasets.Features({**kept, **_FEATURES}),
        num_proc=num_proc if num_proc is None else min(num_proc, len(dataset)),
        keep_in_memory=True,
        load_from_cache_file=False,
        desc=f"Tokenising {name}",
    )
    table = prepared.with_format("arrow")[:]
    report = _report(table, name, max_length, truncation_mode)
    _tell(report)
    kept_rows = pa.compute.equal(table["reason"], 0)
    table = table.filter(kept_rows).select([*ID_COLUMNS, *kept])
    return datasets.Dataset(table), report


def prepare_row(
    row: Mapping[str, Any],
    tokenizer: Any,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
) -> tuple[SplitPair, Cut]:
    """The token ids of one row of the normal form before any cut, and the cut that it would get.

    Raises:
        DataError: the row can't be tokenised.
        ConfigError: max_length or truncation_mode can't be used.
    """
    check_truncation(max_length, truncation_mode)
    prepare = _Preparer(tokenizer, max_length, truncation_mode, strict=False, name="pair")
    (split,) = prepare.split({column: [value] for column, value in row.items()})
    lengths = (len(split.prompt_ids), len(split.chosen_ids), len(split.rejected_ids))
    return split, plan_cut(*lengths, max_length, truncation_mode)


class _Preparer:
    """What `Dataset.map` calls with a batch of rows."""

    def __init__(
        self, tokenizer: Any, max_length: int | None, truncation_mode: str, strict: bool, name: str
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length, self.truncation_mode = max_length, truncation_mode
        self.strict, self.name = strict, name

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        pairs = [
            self._prepare(split, row)
            for split, row in zip(self.split(batch), batch["row"], strict=True)
        ]
        return {column: [getattr(pair, column) for pair in pairs] for column in _FEATURES}

    def split(self, batch: Mapping[str, list[Any]]) -> list[SplitPair]:
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        if "prompt_ids" in batch:
            splits = [SplitPair(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in rows]
        else:
            splits = self._split_texts(rows)
        for split, row in zip(splits, rows, strict=True):
            try:
                self._check(split, plain="prompt_ids" not in row)
            except RowError as problem:
                raise self._error(row["row"], problem) from None
        return splits

    def _split_texts(self, rows: list[dict[str, Any]]) -> list[SplitPair]:
        if self.tokenizer is None:
            raise DataError(f"{self.name} is not tokenised yet and there is no tokenizer; give one")
        texts, plain = [], True
        for row in rows:
            try:
                text, plain = render_pair_texts(row, self.tokenizer)
            except RowError as problem:
                raise self._error(row["row"], problem) from None
            texts.append(text)
        return BoundaryTokenizer(self.tokenizer).split(texts, plain)

    def _check(self, split: SplitPair, plain: bool) -> None:
        if not split.prompt_ids:
            raise RowError(
                "the prompt has no token, so nothing predicts an answer's first token; give a "
                "prompt, or a tokenizer that begins every text with a BOS token"
            )
        eos = [] if self.tokenizer is None else [self.tokenizer.eos_token_id]
        for column, ids in (("chosen", split.chosen_ids), ("rejected", split.rejected_ids)):
            if not ids or (plain and ids == eos):
                raise RowError(f"{column} tokenises to nothing; give it a text or remove the row")
        if self.tokenizer is not None and not plain:
            largest = max(max(split.prompt_ids), max(split.chosen_ids), max(split.rejected_ids))
            if largest > self._last_id:
                raise RowError(
                    f"token id {largest} is beyond {self._last_id}, the tokenizer's last; tokenise "
                    "with the tokenizer of this model"
                )

    @cached_property
    def _last_id(self) -> int:
        # Not len(tokenizer): there may be gaps between the ids.
        return max(self.tokenizer.get_vocab().values())

    def _prepare(self, split: SplitPair, row: int) -> PreparedPair:
        prompt, chosen, rejected = split.prompt_ids, split.chosen_ids, split.rejected_ids
        lengths = (len(prompt), len(chosen), len(rejected))
        cut, reason = Cut(), None
        if chosen == rejected:
            reason = IDENTICAL
        else:
            cut = plan_cut(*lengths, self.max_length, self.truncation_mode)
            prompt = prompt[cut.prompt :]
            chosen = chosen[: len(chosen) - cut.chosen]
            rejected = rejected[: len(rejected) - cut.rejected]
            if not cut.fits:
                reason = NO_ROOM
            elif chosen == rejected:
                reason = IDENTICAL_CUT
        if reason is not None:
            if self.strict:
                raise self._error(row, self._refusal(reason, lengths[0]))
            prompt, chosen, rejected, cut = [], [], [], Cut()
        return PreparedPair(
            *(prompt, chosen, rejected),
            0 if reason is None else 1 + REASONS.index(reason),
            *lengths,
            *(cut.prompt, cut.chosen, cut.rejected),
            split.merged,
            split.rerendered,
        )

    def _refusal(self, reason: str, prompt_length: int) -> RowError:
        if reason == NO_ROOM:
            return RowError(
                f"the prompt has {prompt_length} tokens, which leaves no room for an answer in "
                f"max_length {self.max_length}; raise max_length or use truncation_mode keep_end"
            )
        return RowError(
            f"the pair has {reason}; remove the row, or leave strict off to have such pairs left "
            "out and reported"
        )

    def _error(self, row: int, problem: RowError) -> DataError:
        return DataError(f"{self.name}, row {row} (counted from 0): {problem}")


def _report(
    table: pa.Table, name: str, max_length: int | None, truncation_mode: str
) -> PreparationReport:
    columns = {c: table[c].to_numpy() for c in _FEATURES if not c.endswith("_ids")}
    reasons, rows = columns["reason"], table["row"].to_numpy()
    left_out = {
        reason: tuple(rows[reasons == code].tolist())
        for code, reason in enumerate(REASONS, start=1)
        if np.any(reasons == code)
    }
    prompt = columns["prompt_length"]
    answers = np.concatenate([columns["chosen_length"], columns["rejected_length"]])
    cuts = {part: columns[f"{part}_cut"] for part in ("prompt", "chosen", "rejected")}
    return PreparationReport(
        name=name,
        pairs_read=len(rows),
        pairs_kept=int(np.sum(reasons == 0)),
        left_out=left_out,
        answers_cut=int(np.sum(cuts["chosen"] > 0) + np.sum(cuts["rejected"] > 0)),
        prompts_cut=int(np.sum(cuts["prompt"] > 0)),
        tokens_cut=int(sum(cut.sum() for cut in cuts.values())),
        boundary_merges=int(columns["merged"].sum()),
        rerendered_prompts=int(columns["rerendered"].sum()),
        max_length=max_length,
        truncation_mode=truncation_mode,
        prompt_lengths=Lengths.of(prompt),
        answer_lengths=Lengths.of(answers),
        sequence_lengths=Lengths.of(np.concatenate([prompt, prompt]) + answers),
    )


def _tell(report: PreparationReport) -> None:
    if report.pairs_kept == 0:
        reasons = ", ".join(f"{r} {len(rows)}" for r, rows in report.left_out.items())
        raise DataError(
            f"{report.name}: all {report.pairs_read} pairs were left out ({reasons}); raise "
            "max_length or give pairs whose answers differ"
        )
    if report.rerendered_prompts:
        logger.warning(
            "%s: in %d of %d pairs the chat template renders the prompt otherwise before an answer "
            "than alone; there the prompt ends where the two part, so the model is trained on a "
            "context that differs from the one it generates from.",
            report.name,
            report.rerendered_prompts,
            report.pairs_read,
        )
