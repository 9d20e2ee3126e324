"""Puts several datasets in the normal form together, by shares if they are given."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from dpofast.columns import (
    ID_COLUMNS,
    PAIRED,
    RANKED,
    REF_COLUMNS,
    SOURCE_COLUMN,
    UNPAIRED,
    WEIGHT_COLUMNS,
    kind_of_columns,
)
from dpofast.data.reading.as_ranked import all_ranked
from dpofast.data.reading.normal_form import (
    SourceNotes,
    is_normal_form,
    normal_form,
    source_notes,
)
from dpofast.data.reading.pair_counts import pair_counts
from dpofast.data.reading.preferences import load_preferences
from dpofast.data.reading.shares import largest_counts
from dpofast.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

WEIGHT, _ = WEIGHT_COLUMNS
LEFT_OUT = -1  # in place of a dataset's number, for a row that isn't trained on


def mix_preferences(
    sets: Mapping[str, Any],
    shares: Mapping[str, float] | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    seed: int = 42,
) -> datasets.Dataset:
    """Put several datasets together.

    Without shares, the mixture has all rows of all datasets. With shares, it is the largest one
    that repeats no row and has each dataset's share of the pairs within one row. If any dataset's
    rows have many answers, pairs become rows with two answers. The rows that are taken of a
    dataset depend on the seed and on the rows' numbers, not on the other datasets.

    Args:
        sets: name -> pairs in any form that `load_preferences` reads; or, for all names, results of
            `load_unpaired`.
        shares: name -> positive number, for all names. They are divided by their sum.
        weights: name -> number of at least 0, for all names: how much each pair of the dataset
            counts in the loss. It multiplies the column `weight`, if the dataset has one.
        seed: decides which rows are taken of a dataset.

    Returns:
        A Dataset in the normal form, with one more column: `source`, the name of the dataset that
        a row comes from. `row` is the row's index there. Datasets and rows keep their order. With
        weights, there is a column `weight`.

    Raises:
        DataError: the datasets don't go together, or a share leaves a dataset without a row.
        ConfigError: a share isn't a positive number, a weight isn't a number of at least 0, or
            their names are others.
    """
    if not sets:
        raise ConfigError("sets is empty; name at least one dataset")
    if shares is not None:
        check_shares(shares, sets)
    if weights is not None:
        check_weights(weights, sets)
    parts = {name: in_normal_form(source, name) for name, source in sets.items()}
    _refuse_mixtures(parts)
    _refuse_pairs_beside_unpaired(parts)
    _refuse_two_kinds(parts)
    _refuse_half_scored(parts)
    parts = all_ranked(parts)
    tables = []
    for name, part in parts.items():
        table = part.with_format("arrow")[:]
        if weights is not None:
            table = _weighted(table, float(weights[name]))
        tables.append(table.append_column(SOURCE_COLUMN, pa.array([name] * len(part), pa.string())))
    notes = functools.reduce(SourceNotes.merged, map(source_notes, parts.values()))
    # A column that only some datasets have is filled with nulls.
    mixture = normal_form(pa.concat_tables(tables, promote_options="default"), notes)
    if shares is not None:
        return take_shares(mixture, shares, seed)
    counts = rows_by_source(mixture)
    taken = ", ".join(f"{count:,} from {name}" for name, count in counts.items())
    logger.info("mixture: %s pairs, %s", f"{sum(counts.values()):,}", taken)
    return mixture


def in_normal_form(source: Any, name: str) -> datasets.Dataset:
    """Pairs in any form in their normal form; unpaired rows have to be in theirs already."""
    if is_normal_form(source, UNPAIRED):
        dataset: datasets.Dataset = source
        return dataset
    return load_preferences(source, name=name)


def take_shares(
    mixture: datasets.Dataset,
    shares: Mapping[str, float],
    seed: int,
    *,
    name: str = "mixture",
    at_most: int | None = None,
) -> datasets.Dataset:
    """Select rows so that the datasets of a mixture have these shares.

    Rows that were left out when they were read, and pairs with equal answers, don't count. They
    stay, so that they are reported. A row with many answers counts as often as it has pairs, and
    is taken whole or not at all.

    Args:
        mixture: result of `mix_preferences`, or a selection of its rows.
        shares: name of a dataset -> positive number, for all datasets of the mixture.
        seed: decides which rows are taken.
        name: name of the mixture, used in errors and the log.
        at_most: most rows to take; None for as many as there are.

    Raises:
        DataError: a share leaves a dataset without a row.
    """
    sources = sources_of(mixture)
    available = dict.fromkeys(shares, 0) | sources.sizes()
    counts = taken_of(available, shares, name, at_most)
    rows = _column(mixture, "row").to_numpy()
    chosen = [np.flatnonzero(sources.numbers == LEFT_OUT)]
    for key, count in counts.items():
        indices = np.flatnonzero(sources.numbers == sources.names[key])
        # Ranks by a hash of the row's number don't change when other rows are held out. numpy
        # doesn't promise that a seed gives the same permutation in its next version.
        ranks = [xxhash.xxh3_64_intdigest(b"%d" % row, seed % 2**64) for row in rows[indices]]
        order = indices[np.argsort(np.array(ranks, dtype=np.uint64), kind="stable")]
        ends = np.cumsum(sources.counts[order])
        # The row with many answers that would be one too many is left out, but for the first.
        num_rows = max(int(np.searchsorted(ends, count, side="right")), 1)
        chosen.append(order[:num_rows])
        counts[key] = int(ends[num_rows - 1])
    size = sum(counts.values())
    taken = ", ".join(
        f"{count:,} of {available[key]:,} from {key} ({count / size:.2%})"
        for key, count in counts.items()
    )
    logger.info("%s: %s %s, %s", name, f"{size:,}", what_counts(mixture), taken)
    return mixture.select(np.sort(np.concatenate(chosen)))


def taken_of(
    available: Mapping[str, int],
    shares: Mapping[str, float],
    name: str,
    at_most: int | None = None,
) -> dict[str, int]:
    """Name of each dataset -> rows that `take_shares` takes of it.

    Raises:
        DataError: a share leaves a dataset without a row.
    """
    counts = None
    if min(available.values()):
        wanted = [shares[key] for key in available]
        counts = largest_counts(list(available.values()), wanted, at_most)
    if counts is None:
        smallest = min(available, key=lambda key: (min(available[key], 1), shares[key]))
        has = ", ".join(f"{key} has {rows:,}" for key, rows in available.items())
        raise DataError(
            f"{name}: the shares leave nothing of {smallest} ({has}); "
            + ("raise its share" if available[smallest] else "hold out more or less")
            + ", give it more rows, or leave it out"
        )
    return dict(zip(available, counts, strict=True))


def what_counts(dataset: datasets.Dataset) -> str:
    """What messages call the examples of a dataset in the normal form, in the plural."""
    kind = kind_of_columns(dataset.column_names)
    return f"{(UNPAIRED if kind.labelled else PAIRED).noun}s"


def rows_by_source(dataset: datasets.Dataset) -> dict[str, int]:
    """Name of each dataset in a mixture -> number of its pairs; empty if it isn't a mixture."""
    if SOURCE_COLUMN not in dataset.column_names:
        return {}
    return sources_of(dataset).sizes()


@dataclass(frozen=True, slots=True)
class Sources:
    """Which dataset of a mixture each row comes from.

    Attributes:
        names: name of each dataset -> its number.
        numbers: number of each row's dataset, [n] int; LEFT_OUT for a row that isn't trained on:
            one that was left out when it was read, or has equal answers.
        counts: pairs of each row, [n] int64; see `pair_counts`.
    """

    names: dict[str, int]
    numbers: np.ndarray
    counts: np.ndarray

    def sizes(self) -> dict[str, int]:
        """Name of each dataset -> its pairs."""
        return {
            name: int(self.counts[self.numbers == number].sum())
            for name, number in self.names.items()
        }


def sources_of(dataset: datasets.Dataset, name: str = "") -> Sources:
    """Number the datasets of a mixture in the order in which they first occur.

    Args:
        dataset: a mixture; or a single dataset, which gets the number 0.
        name: name of a single dataset.
    """
    if SOURCE_COLUMN in dataset.column_names:
        encoded = _column(dataset, SOURCE_COLUMN).combine_chunks().dictionary_encode()
        names, numbers = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    else:
        names, numbers = [name], np.zeros(len(dataset), dtype=np.int32)
    counts = pair_counts(dataset)
    numbers = np.where(counts > 0, numbers, LEFT_OUT)
    return Sources({name: number for number, name in enumerate(names)}, numbers, counts)


def check_shares(shares: Mapping[str, float], names: Collection[str]) -> None:
    """Raise ConfigError unless there is a positive number for each of these datasets."""
    _check_names("share", shares, names)
    for name, share in shares.items():
        if not _is_finite(share) or share <= 0:
            raise ConfigError(
                f"got {share!r} as the share of {name!r}, expected a number above 0; leave a "
                "dataset out if it is to give nothing."
            )


def check_weights(weights: Mapping[str, float], names: Collection[str]) -> None:
    """Raise ConfigError unless each dataset has a number of at least 0, and one is above 0."""
    _check_names("weight", weights, names)
    for name, weight in weights.items():
        if not _is_finite(weight) or weight < 0:
            raise ConfigError(
                f"got {weight!r} as the weight of {name!r}, expected a number of at least 0."
            )
    if not any(weights.values()):
        raise ConfigError("all weights are 0, so nothing would be trained; raise one of them.")


def _check_names(what: str, given: Mapping[str, float], names: Collection[str]) -> None:
    if set(given) != set(names):
        raise ConfigError(
            f"{what}s are given for {', '.join(map(repr, given)) or 'nothing'}, but the datasets "
            f"are {', '.join(map(repr, names))}; give each of them one {what}."
        )


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _weighted(table: pa.Table, weight: float) -> pa.Table:
    """The table of a dataset whose pairs count by this much more or less."""
    if WEIGHT in table.column_names:
        index = table.column_names.index(WEIGHT)
        return table.set_column(index, WEIGHT, pc.multiply(table[WEIGHT], weight))
    return table.append_column(WEIGHT, pa.array([weight] * len(table), pa.float64()))


def _column(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column in Arrow; `dataset[name]` would read it row by row."""
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def _kind_of(dataset: datasets.Dataset) -> str:
    """What the rows of a dataset in the normal form are: token ids, text or messages."""
    if ID_COLUMNS[0] in dataset.column_names:
        return "token ids"
    return "text" if dataset.features["prompt"] == datasets.Value("string") else "messages"


def _refuse_pairs_beside_unpaired(parts: Mapping[str, datasets.Dataset]) -> None:
    kinds = {name: kind_of_columns(part.column_names) for name, part in parts.items()}
    paired = next((name for name, kind in kinds.items() if not kind.labelled), None)
    unpaired = next((name for name, kind in kinds.items() if kind.labelled), None)
    if paired is not None and unpaired is not None:
        is_ranked = kinds[paired] is RANKED
        what = "rows with many answers" if is_ranked else "pairs"
        remedy = (
            "write each of those answers as a row with completion and label"
            if is_ranked
            else "split the pairs with split_pairs of dpofast.data"
        )
        raise DataError(
            f"{paired} holds {what} and {unpaired} unpaired rows, and the rows of a run are all of "
            f"one kind; {remedy}"
        )


def _refuse_mixtures(parts: Mapping[str, datasets.Dataset]) -> None:
    for name, part in parts.items():
        if SOURCE_COLUMN in part.column_names:
            raise DataError(f"{name} is a mixture already; mix all its datasets at once")


def _refuse_two_kinds(parts: Mapping[str, datasets.Dataset]) -> None:
    kinds = {name: _kind_of(part) for name, part in parts.items()}
    (first, kind), *others = kinds.items()
    for name, other in others:
        if other != kind:
            remedy = (
                "give the texts of both, or the token ids of both"
                if "token ids" in (kind, other)
                else "write both as messages, or both as text"
            )
            raise DataError(
                f"{first} has {kind}, but {name} has {other}, and the pairs of a run are all of "
                f"one kind; {remedy}"
            )


def _refuse_half_scored(parts: Mapping[str, datasets.Dataset]) -> None:
    scored = {name: set(REF_COLUMNS) <= set(part.column_names) for name, part in parts.items()}
    if len(set(scored.values())) == 2:
        having = next(name for name in scored if scored[name])
        without = next(name for name in scored if not scored[name])
        raise DataError(
            f"{having} has {' and '.join(REF_COLUMNS)}, but {without} has not, and they come from "
            "all datasets of a run or from none; give them to both, or leave these columns out"
        )
