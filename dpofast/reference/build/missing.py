"""Why rows are missing from the store, in words."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpofast.errors import ReferenceStoreError
from dpofast.reference.store.namespace import Namespace
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore
from dpofast.reference.store.text import flatten, printable, shown

MOST_DIFFERENCES = 4


def why_missing(
    namespace: Namespace,
    found: int,
    held: np.ndarray | None = None,
    detail: RowDetail = RowDetail.SUMS,
) -> str:
    """One clause about the rows of a dataset that a namespace lacks.

    Args:
        namespace: that was asked.
        found: rows of the dataset that it has, in the detail asked for.
        held: [m] bool, which of the others it has in less detail; None for none.
        detail: that was asked for.
    """
    poorer = 0 if held is None else int(held.sum())
    if held is not None and poorer:
        reason = f"{poorer} of them are stored without {detail.added_values}"
        rest = len(held) - poorer
        return f"{reason}; {_why_absent(namespace, found + poorer)}" if rest else reason
    return _why_absent(namespace, found)


def _why_absent(namespace: Namespace, found: int) -> str:
    """Of rows that the namespace has in no detail; `found` of the dataset's it has."""
    if found:
        return "the rest are new answers, or were cut or tokenised in another way"
    if len(namespace):
        return (
            f"the store has {len(namespace)} rows of this reference, but of other answers, or "
            "tokenised in another way (tokenizer, chat template, max_length, truncation_mode)"
        )
    others = _others(namespace)
    if not others:
        return "the store is new"
    nearest = min((differences(namespace.identity.description, other) for other in others), key=len)
    shown = "; ".join(nearest[:MOST_DIFFERENCES])
    more = len(nearest) - MOST_DIFFERENCES
    return (
        f"the store has no rows of this reference, but of {len(others)} "
        f"{'other' if len(others) == 1 else 'others'}; the nearest differs in {shown}"
        + (f"; and {more} more" if more > 0 else "")
    )


def _others(namespace: Namespace) -> list[dict[str, Any]]:
    """Descriptions of the store's other references; one that can't be read explains nothing."""
    descriptions = []
    store = ReferenceStore(namespace.store_folder)
    for digest in store.digests():
        if digest != namespace.identity.digest:
            try:
                descriptions.append(store.identity(digest).description)
            except ReferenceStoreError:
                continue
    return descriptions


def differences(wanted: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """What differs between two descriptions, one sentence for each name."""
    ours, theirs = flatten(wanted), flatten(stored)
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or ours[name] != theirs[name]:
            there, here = shown(theirs.get(name, "-")), shown(ours.get(name, "-"))
            lines.append(f"{printable(name)}: {there} there, {here} here")
    return lines
