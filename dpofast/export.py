"""Preference pairs with their reference log-probs beside them, as a file to train on."""

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

from dpofast.columns import REF_COLUMNS
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
    """Where preference pairs come from, and how they are read; as for `load_preferences`.

    Attributes:
        source: a path, a hub name, a datasets.Dataset, a list of dicts.
        columns, split, roles, config_name: as there.

    Raises:
        DataError: from `rows` and `pairs`, as there.
    """

    source: Any
    columns: Mapping[str, str] | None = None
    split: str = "train"
    roles: Mapping[str, str] | None = None
    config_name: str | None = None

    def rows(self) -> Iterator[Row]:
        """As they stand there, with all their columns."""
        records = read_records(
            self.source, split=self.split, name=None, config_name=self.config_name
        )
        return (dict(record.values) for record in records)

    def pairs(self) -> datasets.Dataset:
        """In the normal form."""
        return load_preferences(
            self.source,
            columns=self.columns,
            split=self.split,
            roles=self.roles,
            config_name=self.config_name,
        )


def export_pairs(
    path: str | Path,
    source: Source,
    tokens: datasets.Dataset,
    report: PreparationReport,
    namespace: Namespace,
) -> int:
    """Write the pairs that a run trains on, their reference log-probs in two columns more.

    Rows keep their columns and their order; the columns ref_chosen_logps and ref_rejected_logps
    are float64, in nats, exactly as the store has them. Pairs that `tokenize_preferences` left out
    are left out here, too. The file is written whole or not at all, and read back first: the pairs
    in it are those that were scored.

    Args:
        path: of the file, .parquet, .jsonl, .ndjson or .json; replaced where it exists.
        source: of the pairs.
        tokens, report: what `tokenize_preferences` made of them.
        namespace: of the reference.

    Returns:
        Rows written.

    Raises:
        MissingRowsError: the store lacks some; nothing is scored here.
        DataError: answers were cut, so that their log-probs aren't those of the rows; the rows
            have such columns already; the file's format can't hold the rows as they are.
        ConfigError: an ending that is none of these; a path that can't be written, or that the
            pairs are read from.
    """
    path = check_output(path, source.source)
    _refuse_cuts(report)
    pairs = source.pairs()
    places = _places(pairs, tokens)
    try:
        logps = reference_logps(namespace, read_answers(tokens)).tolist()
    except MissingRowsError as error:
        raise MissingRowsError(
            f"{error} Nothing was written; run `dpofast ref build` with the same options first."
        ) from error
    wanted = iter(zip(places, logps, strict=True))
    rows: list[Row] = []
    place, of_pair = next(wanted)
    for index, row in enumerate(source.rows()):
        if index == place:
            rows.append({**row, **dict(zip(REF_COLUMNS, of_pair, strict=True))})
            place, of_pair = next(wanted, (-1, []))
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}{path.suffix.lower()}")
    try:
        WRITERS[path.suffix.lower()](temporary, rows, source.source)
        _check_written(temporary, path, source, pairs.select(places), logps)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows)


def check_output(path: str | Path, source: Any) -> Path:
    """The path, if a file of that ending can be written there and isn't the source itself.

    Raises:
        ConfigError: it can't, or is.
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
            f"cut to max_length={report.max_length}, so their log-probs are not those of the rows "
            "in a file: raise max_length, for `dpofast ref build` too, or leave these rows out."
        )


def _places(pairs: datasets.Dataset, tokens: datasets.Dataset) -> list[int]:
    """Of each tokenised pair, where it stands among all pairs."""
    brought = [name for name in REF_COLUMNS if name in pairs.column_names]
    if brought:
        raise DataError(
            f"The pairs have a column {brought[0]!r} already, which a run believes: remove the "
            f"columns {' and '.join(REF_COLUMNS)} to have them taken from the store."
        )
    place_of = {row: place for place, row in enumerate(pairs["row"])}
    if len(place_of) < len(pairs):
        raise DataError(
            "The pairs have a column 'row' in which a number stands twice, so nobody knows which "
            "row is which: remove that column."
        )
    return [place_of[row] for row in tokens["row"]]


def _schema(source: Any) -> pa.Schema | None:
    """The types that a Dataset's or a Parquet file's columns have, and ours; None elsewhere."""
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
    """Floats as Python writes them: the shortest text that reads back as the same bits."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"A row can't be written as JSON ({error}): write .parquet instead."
        ) from error


def _write_parquet(path: Path, rows: Sequence[Row], source: Any) -> None:
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    try:
        schema = _schema(source)
        if schema is None:
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


def _check_written(
    temporary: Path,
    path: Path,
    source: Source,
    pairs: datasets.Dataset,
    logps: Sequence[Sequence[float]],
) -> None:
    """Raise DataError unless the file reads back as these pairs with these log-probs."""
    columns, roles = source.columns, source.roles
    written = Source(str(temporary), columns=columns, roles=roles).pairs()
    for number, (pair, own, read) in enumerate(zip(pairs, logps, written, strict=True)):
        found = [read.pop(name) for name in REF_COLUMNS]
        names = pair.keys() - {"row"}
        same = all(_filled(read.get(name)) == _filled(pair[name]) for name in names)
        if found != own or not same:
            raise DataError(
                f"{path} was not written: as {path.suffix} its row {number} would read back as "
                "another pair, since a field of it has another type in other rows; write .jsonl "
                "instead."
            )


def _filled(value: Any) -> Any:
    """A column's value, its messages without `extra` where that is null, as only some have it."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return value
    return [{name: item for name, item in message.items() if item is not None} for message in value]
