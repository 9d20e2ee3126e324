"""Writes preference pairs and their stored reference log-probs to a file to train on."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from dpofast.columns import RANKED, REF_COLUMNS, kind_of_columns
from dpofast.data.reading.files import data_suffix
from dpofast.data.reading.preferences import load_preferences
from dpofast.data.reading.sources import read_records
from dpofast.data.tokens.report import PreparationReport
from dpofast.errors import ConfigError, DataError, MissingRowsError
from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.builder import reference_logps
from dpofast.reference.store.namespace import Namespace

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Preference pairs, and how to read them; the fields are arguments of `load_preferences`.

    Attributes:
        source: path, hub name, datasets.Dataset or list of dicts.
        columns: our name of a column -> its name in the data.
        split: split to read.
        roles: name of a role in the data -> system, user, assistant or tool.
        config_name: configuration of a hub dataset.
        skip_bad_rows: leave out rows that can't be used.

    Raises:
        DataError: the data can't be used; raised by `rows` and `pairs`.
    """

    source: Any
    columns: Mapping[str, str] | None = None
    split: str = "train"
    roles: Mapping[str, str] | None = None
    config_name: str | None = None
    skip_bad_rows: bool = False

    def rows(self) -> Iterator[Row]:
        """Yield the rows as they are in the source, with all their columns."""
        records = read_records(
            self.source, split=self.split, name=None, config_name=self.config_name
        )
        return (dict(record.values) for record in records)

    def pairs(self) -> datasets.Dataset:
        """Load the rows as pairs in the normal form."""
        return load_preferences(
            self.source,
            columns=self.columns,
            split=self.split,
            roles=self.roles,
            config_name=self.config_name,
            skip_bad_rows=self.skip_bad_rows,
        )


def export_pairs(
    path: str | Path,
    source: Source,
    tokens: datasets.Dataset,
    report: PreparationReport,
    namespace: Namespace,
) -> int:
    """Write the pairs that a run trains on, with their reference log-probs in two more columns.

    Rows keep their columns and their order. The new columns, ref_chosen_logps and
    ref_rejected_logps, are float64, in nats, exactly as the store has them. Pairs that
    `tokenize_preferences` leaves out are left out here, too. The file is written whole or not at
    all. It is read back before it gets its name, to be sure that it holds the scored pairs.

    Args:
        path: file to write, .parquet, .jsonl, .ndjson or .json; an existing file is replaced.
        source: pairs to export.
        tokens: the same pairs, tokenised by `tokenize_preferences`.
        report: report that `tokenize_preferences` made of them.
        namespace: stored log-probs of one reference.

    Returns:
        Number of rows written.

    Raises:
        MissingRowsError: log-probs are missing from the store; nothing is scored here.
        DataError: answers were cut, so their log-probs don't belong to the whole answers in the
            rows; the rows have log-prob columns already; or the file's format can't hold the rows
            unchanged.
        ConfigError: the path's ending isn't in WRITERS, the file can't be written, or the path is
            the source.
    """
    path = check_output(path, source.source)
    _refuse_cuts(report)
    pairs = source.pairs()
    if kind_of_columns(pairs.column_names) is RANKED:
        raise DataError(
            "The rows have many answers (completions), and the file would have columns of one "
            "pair: write each pair as a row with chosen and rejected first. A run that has this "
            "reference store needs no such file."
        )
    _refuse_ref_columns(pairs)
    indices = _source_indices(pairs, tokens)
    logps = _stored_logps(namespace, tokens)
    logps_of = dict(zip(indices, logps, strict=True))
    rows = [
        {**row, **dict(zip(REF_COLUMNS, logps_of[index], strict=True))}
        for index, row in enumerate(source.rows())
        if index in logps_of
    ]
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}{path.suffix.lower()}")
    try:
        WRITERS[path.suffix.lower()](temporary, rows, source.source)
        _refuse_changed_pairs(temporary, path, source, pairs.select(indices), logps)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows)


def check_output(path: str | Path, source: Any) -> Path:
    """Check that a file can be written to a path, and isn't the source itself.

    Returns:
        The path, with `~` expanded.

    Raises:
        ConfigError: the path's ending isn't in WRITERS, its folder doesn't exist, or the path is
            the source.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in WRITERS:
        raise ConfigError(
            f"output: got {str(path)!r}, expected a name that ends in one of {', '.join(WRITERS)}."
        )
    if not path.parent.is_dir():
        raise ConfigError(f"output: there is no folder {path.parent}; make it first.")
    if isinstance(source, str | Path) and Path(source).expanduser().resolve() == path.resolve():
        raise ConfigError(f"output: {path} is the file that the pairs are read from; name another.")
    return path


def _refuse_cuts(report: PreparationReport) -> None:
    if report.tokens_cut:
        raise DataError(
            f"{report.name}: {report.answers_cut} answers and {report.prompts_cut} prompts were "
            f"cut to {report.limits}, so their log-probs are not those of the rows in a file: "
            f"raise {report.limits.names}, for `dpofast ref build` too, or leave these rows out."
        )


def _refuse_ref_columns(pairs: datasets.Dataset) -> None:
    brought = [name for name in REF_COLUMNS if name in pairs.column_names]
    if brought:
        raise DataError(
            f"The pairs have a column {brought[0]!r} already, which a run believes: remove the "
            f"columns {' and '.join(REF_COLUMNS)} to have them taken from the store."
        )


def _source_indices(pairs: datasets.Dataset, tokens: datasets.Dataset) -> list[int]:
    """The index of each tokenised pair among all pairs of the source."""
    # The column `row` needn't count from 0: a source with such a column keeps its own numbers.
    index_of = {row: index for index, row in enumerate(pairs["row"])}
    if len(index_of) < len(pairs):
        raise DataError(
            "Two pairs have the same row number: a row has several rejected answers, or the column "
            "'row' has a number twice. Write each pair as a row of its own, or remove that column."
        )
    return [index_of[row] for row in tokens["row"]]


def _stored_logps(namespace: Namespace, tokens: datasets.Dataset) -> list[list[float]]:
    """Read [chosen, rejected] for each pair, in nats."""
    try:
        return reference_logps(namespace, read_answers(tokens)).tolist()
    except MissingRowsError as error:
        raise MissingRowsError(
            f"{error} Nothing was written; run `dpofast ref build` with the same options first."
        ) from error


def _schema(source: Any) -> pa.Schema | None:
    """The schema of the file to write: the source's columns and ours.

    It is None unless the source is a Dataset or a Parquet file, which have types. Without a schema,
    Arrow would guess the types from the values and could write, say, a float32 column as double.
    """
    if isinstance(source, datasets.Dataset):
        features = source.features
    elif isinstance(source, str | Path) and data_suffix(Path(source)) == ".parquet":
        schema = pa.parquet.read_schema(Path(source).expanduser())
        features = datasets.Features.from_arrow_schema(schema)
    else:
        return None
    added = dict.fromkeys(REF_COLUMNS, datasets.Value("float64"))
    return datasets.Features({**features, **added}).arrow_schema


def _write_json_lines(path: Path, rows: Sequence[Row], _: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{_json(row)}\n" for row in rows)


def _write_json(path: Path, rows: Sequence[Row], _: Any) -> None:
    text = ",\n".join(_json(row) for row in rows)
    path.write_text(f"[\n{text}\n]\n", encoding="utf-8")


def _json(row: Row) -> str:
    try:
        # Python writes a float as the shortest text that reads back as the same bits.
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"A row can't be written as JSON ({error}): write .parquet instead."
        ) from error


def _write_parquet(path: Path, rows: Sequence[Row], source: Any) -> None:
    try:
        schema = _schema(source)
        if schema is None:
            # Rows of a JSON file can have different fields; the missing ones are null here.
            names = dict.fromkeys(itertools.chain.from_iterable(rows))
            table = pa.table({name: [row.get(name) for row in rows] for name in names})
        else:
            table = pa.Table.from_pylist(rows, schema=schema)
        pa.parquet.write_table(table, path)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise DataError(
            f"The rows can't be written as Parquet ({error}): write .jsonl instead."
        ) from error


WRITERS: dict[str, Callable[[Path, Sequence[Row], Any], None]] = {
    ".parquet": _write_parquet,
    ".jsonl": _write_json_lines,
    ".ndjson": _write_json_lines,
    ".json": _write_json,
}


def _refuse_changed_pairs(
    temporary: Path,
    path: Path,
    source: Source,
    pairs: datasets.Dataset,
    logps: Sequence[Sequence[float]],
) -> None:
    """Raise DataError unless the file reads back as these pairs with these log-probs.

    Args:
        temporary: file that was written.
        path: name that the file will get, used in the error message.
        source: how to read the pairs.
        pairs: pairs that the file should hold, in its order.
        logps: [chosen, rejected] for each of them.
    """
    columns, roles = source.columns, source.roles
    written = Source(str(temporary), columns=columns, roles=roles).pairs()
    for number, (pair, own, read) in enumerate(zip(pairs, logps, written, strict=True)):
        found = [read.pop(name) for name in REF_COLUMNS]
        # Without the rows that were left out, a row has another number in the file.
        names = pair.keys() - {"row"}
        same = all(_comparable(read.get(name)) == _comparable(pair[name]) for name in names)
        if found != own or not same:
            raise DataError(
                f"{path} was not written: as {path.suffix} its row {number} would read back as "
                "another pair, since a field of it has another type in other rows; write .jsonl "
                "instead."
            )


def _comparable(value: Any) -> Any:
    """A column's value without the null fields of its messages.

    If any message of a dataset has a field `extra`, all its messages have one, most of them null.
    The pairs to compare can come from datasets that differ in this.
    """
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return value
    return [{name: item for name, item in message.items() if item is not None} for message in value]
