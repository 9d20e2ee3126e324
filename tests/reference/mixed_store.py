"""A small store with rows of every detail, for tests that read whole stores."""

from __future__ import annotations

import numpy as np

from dpofast.reference.store.prune import prune
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore
from tests.reference.stubs import identity

ROWS = {bytes([i] * 16): np.float32([-i, -1.5, -0.25][: i % 3 + 1]) for i in range(1, 4)}
DETAILS = dict(zip(ROWS, RowDetail, strict=True))


def mixed_store(folder):
    """Make a store with one segment."""
    store = ReferenceStore.open(folder, create=True)
    for key, values in ROWS.items():
        writer = store.namespace(identity()).writer(detail=DETAILS[key])
        writer.add(key, np.stack([values, -7 * values]))
        writer.commit()
    prune(store.folder)
    return store


def segment_of(store):
    """The path of the store's only segment."""
    return next(store.folder.glob("*/*.arrow"))
