"""The reasons for which reading leaves out a row; the report lists its rows by reason."""

from __future__ import annotations

IDENTICAL = "identical answers"
EMPTY = "empty answer"
BAD_ROW = "bad row"
