"""Explains why rows are missing from the store."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpofast.errors import ReferenceStoreError
from dpofast.reference.identity.readable import differences
from dpofast.reference.store.namespace import Namespace
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore

MOST_DIFFERENCES = 4  # options that an explanation names


def why_missing(
    namespace: Namespace,
    found: int,
    held: np.ndarray | None = None,
    detail: RowDetail = RowDetail.SUMS,
) -> str:
    """Write a clause that explains why answers have no row in a namespace.

    Args:
        namespace: namespace that was searched.
        found: number of the dataset's answers with a row in the detail asked for.
        held: [m] bool, True for the missing answers that are stored with less detail; None if there
            are none.
        detail: detail that was asked for.
    """
    less = 0 if held is None else int(held.sum())
    if held is not None and less:
        reason = f"{less} of them are stored without {detail.added_values}"
        rest = len(held) - less
        return f"{reason}; {_why_absent(namespace, found + less)}" if rest else reason
    return _why_absent(namespace, found)


def _why_absent(namespace: Namespace, found: int) -> str:
    """Explain why answers have no row in any detail, given that `found` other answers have one."""
    if found:
        return "the rest are new answers, or were cut or tokenised in another way"
    if len(namespace):
        return (
            f"the store has {len(namespace)} rows of this reference, but of other answers, or "
            "tokenised in another way (tokenizer, chat template, lengths to which pairs are cut)"
        )
    others = _others(namespace)
    if not others:
        return "the store is new"
    nearest = min((differences(namespace.identity.description, other) for other in others), key=len)
    named = "; ".join(nearest[:MOST_DIFFERENCES])
    more = len(nearest) - MOST_DIFFERENCES
    return (
        f"the store has no rows of this reference, but of {len(others)} "
        f"{'other' if len(others) == 1 else 'others'}; the nearest differs in {named}"
        + (f"; and {more} more" if more > 0 else "")
    )


def _others(namespace: Namespace) -> list[dict[str, Any]]:
    """Read the descriptions of the store's other references, skipping those that can't be read."""
    descriptions = []
    store = ReferenceStore(namespace.store_folder)
    for digest in store.digests():
        if digest != namespace.identity.digest:
            try:
                descriptions.append(store.identity(digest).description)
            except ReferenceStoreError:
                continue
    return descriptions
