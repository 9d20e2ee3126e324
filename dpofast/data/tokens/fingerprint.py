"""A content hash of tokenised rows."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import xxhash

from dpofast.columns import LABEL_COLUMN, WEIGHT_COLUMNS, kind_of_columns
from dpofast.data.tokens.pooled import PooledPairs

_BATCH_ROWS = 10_000


def data_fingerprint(dataset: datasets.Dataset | PooledPairs) -> str:
    """Hash the token ids of all pairs, or all unpaired rows with their labels, and their order.

    Of pooled pairs, it hashes the ids of the answers, and which of them make a pair.

    The hash is the same on every machine and doesn't depend on how the dataset is chunked or
    stored. It is xxh3_128 over the lengths and the ids of each column, as little-endian int64; and
    over the labels, as bytes, or the numbers of the pairs' answers, if there are any.

    Returns:
        32 hexadecimal digits.
    """
    index = dataset.index if isinstance(dataset, PooledPairs) else None
    if isinstance(dataset, PooledPairs):
        dataset = dataset.answers
    # Lengths are hashed apart from ids, so [1, 2], [3] and [1], [2, 3] differ.
    columns = kind_of_columns(dataset.column_names).id_columns
    hashers = {name: (xxhash.xxh3_128(), xxhash.xxh3_128()) for name in columns}
    view = dataset.select_columns(list(columns)).with_format("arrow")
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
    if LABEL_COLUMN in dataset.column_names:
        total.update(bytes(dataset[LABEL_COLUMN][:]))
    if index is not None:
        total.update(np.ascontiguousarray(index, "<i8").tobytes())
    return total.hexdigest()


def pairs_fingerprint(dataset: datasets.Dataset | PooledPairs) -> str:
    """Hash all that a run trains on: the token ids, and the weights and confidences of the pairs.

    Returns:
        The result of `data_fingerprint`; and, if some pairs have a weight other than 1 or a
        confidence, a hash of both after a hyphen.
    """
    hasher = None
    for column, neutral in zip(WEIGHT_COLUMNS, (1.0, None), strict=True):
        if column not in dataset.column_names:
            continue
        values = dataset.select_columns([column]).with_format("arrow")[:][column]
        if set(values.unique().to_pylist()) <= {None, neutral}:  # as if there were no column
            continue
        hasher = hasher or xxhash.xxh3_128()
        numbers = values.to_numpy().astype("<f8")  # NaN for null
        missing = np.nan if neutral is None else neutral
        hasher.update(column.encode() + np.where(np.isnan(numbers), missing, numbers).tobytes())
    ids = data_fingerprint(dataset)
    return ids if hasher is None else f"{ids}-{hasher.hexdigest()}"
