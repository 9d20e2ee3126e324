"""Collects the rows that can't be used, so that one error names them together."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpofast.errors import ConfigError, DataError

SHOWN_ROWS = 10  # rows that an error names
SKIP_REMEDY = "skip_bad_rows: true leaves such rows out"


def check_strictness(strict: bool, skip_bad_rows: bool) -> None:
    """Raise ConfigError if bad rows are to stop the run and to be skipped at once."""
    if strict and skip_bad_rows:
        raise ConfigError(
            "skip_bad_rows leaves out rows at which strict stops; set only one of the two."
        )


@dataclass
class BadRows:
    """The rows of one source that can't be used.

    Attributes:
        places: place and problem of each of the first rows, in words.
        count: all of them.
    """

    places: list[tuple[str, str]] = field(default_factory=list)
    count: int = 0

    def add(self, place: str, problem: str) -> None:
        """Note a row.

        Args:
            place: file and line, or dataset and row, in words.
            problem: what is wrong and what to do.
        """
        self.count += 1
        if len(self.places) < SHOWN_ROWS:
            self.places.append((place, problem))

    def error(self, name: str, rows_read: int) -> DataError:
        """The error that names the first rows.

        Args:
            name: name of the source.
            rows_read: rows that were read, good ones included.
        """
        if self.count == 1:
            (place, problem) = self.places[0]
            hint = f" ({SKIP_REMEDY})" if rows_read > 1 else ""
            return DataError(f"{place}: {problem}{hint}")
        lines = [f"{name}: {self.count} of {rows_read} rows can't be used:"]
        lines += [f"  {place}: {problem}" for place, problem in self.places]
        if self.count > SHOWN_ROWS:
            lines.append(f"  and {self.count - SHOWN_ROWS} more")
        if self.count < rows_read:
            lines.append("Mend these rows, or leave them out with skip_bad_rows: true.")
        return DataError("\n".join(lines))
