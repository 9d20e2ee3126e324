"""A content hash of tokenised pairs."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import xxhash

from dpofast.columns import ID_COLUMNS

_BATCH_ROWS = 10_000


def data_fingerprint(dataset: datasets.Dataset) -> str:
    """Hash the token ids of all pairs and their order.

    The hash is the same on every machine and doesn't depend on how the dataset is chunked or
    stored. It is xxh3_128 over the lengths and the ids of each column, as little-endian int64.

    Returns:
        32 hexadecimal digits.
    """
    # Lengths are hashed apart from ids, so [1, 2], [3] and [1], [2, 3] differ.
    hashers = {name: (xxhash.xxh3_128(), xxhash.xxh3_128()) for name in ID_COLUMNS}
    view = dataset.select_columns(list(ID_COLUMNS)).with_format("arrow")
    for table in view.iter(batch_size=_BATCH_ROWS):
        for name, (lengths, values) in hashers.items():
            for chunk in table.column(name).chunks:
                offsets = chunk.offsets.to_numpy(zero_copy_only=False).astype("<i8")
                lengths.update(np.diff(offsets).tobytes())
                # Datasets hold ids as int32 or int64; the hash doesn't depend on which.
                ids = chunk.flatten().cast(pa.int64()).to_numpy(zero_copy_only=False)
                values.update(ids.astype("<i8").tobytes())
    total = xxhash.xxh3_128()
    for lengths, values in hashers.values():
        total.update(lengths.digest() + values.digest())
    return total.hexdigest()
