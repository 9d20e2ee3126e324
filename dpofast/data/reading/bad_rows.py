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
        problems: place of each of the first rows, and what is wrong there and what to do.
        count: all of them.
    """

    problems: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, problem: str) -> None:
        """Note a row: its place, what is wrong with it and what to do."""
        self.count += 1
        if len(self.problems) < SHOWN_ROWS:
            self.problems.append(problem)

    def error(self, name: str, rows_read: int, strict: bool = False) -> DataError:
        """The error that names the first rows.

        Args:
            name: name of the source.
            rows_read: rows that were read, good ones included.
            strict: rows stop the run on the user's own wish, which rules out skipping them.
        """
        can_skip = self.count < rows_read and not strict
        if self.count == 1:
            return DataError(self.problems[0] + (f" ({SKIP_REMEDY})" if can_skip else ""))
        lines = [f"{name}: {self.count} of {rows_read} rows can't be used:"]
        lines += [f"  {problem}" for problem in self.problems]
        if self.count > SHOWN_ROWS:
            lines.append(f"  and {self.count - SHOWN_ROWS} more")
        if can_skip:
            lines.append("Mend these rows, or leave them out with skip_bad_rows: true.")
        return DataError("\n".join(lines))
