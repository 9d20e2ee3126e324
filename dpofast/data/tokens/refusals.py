"""Errors and warnings about the rows of a dataset once all of them are tokenised."""

from __future__ import annotations

import logging

import pyarrow as pa

from dpofast.data.reading.bad_rows import BadRows
from dpofast.data.tokens.left_out import IDENTICAL_CUT, NO_ROOM
from dpofast.data.tokens.outcome import problems
from dpofast.data.tokens.report import PreparationReport
from dpofast.errors import DataError

logger = logging.getLogger(__name__)


def refuse_bad_rows(name: str, table: pa.Table) -> None:
    """Raise DataError if the table of outcomes has bad rows."""
    bad = BadRows()
    for problem in problems(table):
        bad.add(problem)
    if bad.count:
        raise bad.error(name, len(table))


def refuse_nothing_kept(report: PreparationReport) -> None:
    """Raise DataError if no row of a dataset was kept."""
    if report.pairs_kept:
        return
    found, limits = report.left_out, report.limits
    remedies = ["raise max_length"] if NO_ROOM in found else []
    remedies += [f"raise {limits.names}"] if IDENTICAL_CUT in found else []
    if found.keys() - {NO_ROOM, IDENTICAL_CUT}:
        remedies.append(
            "give pairs with two different answers"
            if report.labels is None
            else "give rows with an answer"
        )
    reasons = ", ".join(f"{r} {len(rows)}" for r, rows in found.items())
    raise DataError(
        f"{report.name}: all {report.pairs_read} {report.noun}s were left out ({reasons}); "
        f"{', or '.join(dict.fromkeys(remedies))}"
    )


def warn_of_rerendered_prompts(report: PreparationReport) -> None:
    """Warn of prompts that the template renders in two ways, if a dataset has any."""
    if report.rerendered_prompts:
        logger.warning(
            "%s: in %d of %d %ss the chat template renders the prompt otherwise before an answer "
            "than alone; there the prompt ends where the two part, so the model is trained on a "
            "context that differs from the one it generates from.",
            report.name,
            report.rerendered_prompts,
            report.pairs_read,
            report.noun,
        )
