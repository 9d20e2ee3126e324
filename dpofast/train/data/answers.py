"""Unpaired rows on their way through a run, and the preparation of its datasets from them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import datasets

from dpofast.columns import (
    ID_COLUMNS,
    MISMATCHED_COLUMN,
    SOURCE_COLUMN,
    UNPAIRED,
)
from dpofast.data import (
    data_kind,
    load_preferences,
    load_unpaired,
    refuse_one_label,
    rows_by_source,
    split_pairs,
    tokenize_unpaired,
    with_mismatched,
)
from dpofast.data.packing.answers import AnswerSteps, answer_token_limit
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.token_limit import TokenLimit
from dpofast.errors import ConfigError
from dpofast.train.data.dataset import PairPreparer, ReadPairs, RunDataset
from dpofast_kernels import UnpairedLoss

logger = logging.getLogger(__name__)

PROMPT, ANSWER = UNPAIRED.id_columns


@dataclass(eq=False)
class AnswerDataset(RunDataset):
    """A RunDataset of unpaired rows, which the run counts as pairs.

    Its `pairs` have the columns prompt_ids, completion_ids, label and row; and mismatched_ids if
    the loss compares with answers to other prompts. `ref_logps` are those of both answers, [n, 2];
    without mismatched answers, the second column repeats the first.
    """

    def answer_pairs(self) -> datasets.Dataset:
        assert isinstance(self.pairs, datasets.Dataset)
        table = self.pairs.with_format("arrow")[:]
        other = MISMATCHED_COLUMN if MISMATCHED_COLUMN in table.column_names else ANSWER
        columns = dict(zip(ID_COLUMNS, (PROMPT, ANSWER, other), strict=True))
        places = [name for name in ("row", SOURCE_COLUMN) if name in table.column_names]
        wanted = {name: table[column] for name, column in columns.items()}
        return datasets.Dataset(
            table.select(places).from_arrays(
                [*wanted.values(), *(table[name] for name in places)], [*wanted, *places]
            )
        )

    def padded_prompts(self, layout: Layout) -> None:
        """None: single answers are in no pairs."""
        return None

    def step_dataset(self, layout: Layout, ld_alpha: float | None = None) -> AnswerSteps:
        """The scored rows, indexed by planned steps; these losses have no ld_alpha."""
        assert self.ref_logps is not None, "the dataset is scored first"
        return AnswerSteps(self.pairs, self.ref_logps, layout)

    def _count_tokens(self, layout: Layout, row_tokens: int) -> TokenLimit | None:
        return answer_token_limit(self.pairs, layout, row_tokens)


class AnswerPreparer(PairPreparer):
    """Tokenises a run's unpaired rows, and splits pairs into such rows.

    The arguments and attributes are those of PairPreparer.
    """

    dataset_class = AnswerDataset
    kind = UNPAIRED

    def check_stream(self) -> None:
        raise ConfigError(
            f"train_dataset is a stream, and {self.loss.name} trains datasets that are read as a "
            "whole; give one without streaming (dataset_streaming: false)."
        )

    def read(self, dataset: Any, name: str) -> ReadPairs:
        config = self.config
        rows = self._rows_of(dataset, name)
        is_text = rows.features.get("prompt") == datasets.Value("string")
        tokens, report = tokenize_unpaired(
            rows,
            self.tokenizer,
            **vars(config.length_limits()),
            strict=config.strict,
            skip_bad_rows=config.skip_bad_rows,
            num_proc=config.dataset_num_proc,
            name=name,
        )
        if name == "train" or name.startswith("train_"):
            refuse_one_label(tokens, name)
        if isinstance(self.loss, UnpairedLoss) and self.loss.takes_z:
            tokens = with_mismatched(tokens, name, config.max_length)
        return ReadPairs(tokens, report, rows_by_source(rows), is_text)

    def _rows_of(self, dataset: Any, name: str) -> datasets.Dataset:
        """The unpaired rows of a dataset in the normal form; pairs are split."""
        config = self.config
        arguments: dict[str, Any] = {
            "columns": self.columns,
            "roles": self.roles,
            "strict": config.strict,
            "skip_bad_rows": config.skip_bad_rows,
            "name": name,
        }
        if data_kind(dataset, columns=self.columns) == "unpaired":
            return load_unpaired(dataset, **arguments)
        pairs = load_preferences(dataset, **arguments)
        rows = split_pairs(pairs, name=name)
        if config.should_log:
            logger.info(
                "%s: %s takes answers one by one, so its %d pairs are split into %d rows.",
                *(name, self.loss.name, len(pairs), len(rows)),
            )
        return rows
