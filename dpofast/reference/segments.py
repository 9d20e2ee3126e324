"""A segment: some rows of one reference in an immutable Arrow file, a checksum beside each row."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from dpofast.errors import ReferenceStoreError
from dpofast.reference.files import write_durably
from dpofast.reference.keys import KEY_BYTES

FORMAT_VERSION = 0
SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("logp", pa.float64(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field(
            "per_token_logps",
            pa.list_(pa.field("item", pa.float32(), nullable=False)),
            nullable=False,
        ),
        pa.field("checksum", pa.uint64(), nullable=False),
    ],
    metadata={"format": "dpofast reference segment", "version": str(FORMAT_VERSION)},
)
# <unique>-<rank>-<XXH3-128 of the file's bytes>.arrow
NAME_PATTERN = re.compile(r"[0-9a-f]{32}-[0-9]+-(?P<checksum>[0-9a-f]{32})\.arrow")

# What of a row comes before its per-token log-probs under its checksum; packed, 44 bytes.
_ROW_HEAD = np.dtype(
    [("identity", "V16"), ("key", "V16"), ("logp", "<f8"), ("num_tokens", "<i4")], align=False
)


@dataclass(frozen=True)
class Columns:
    """The rows of a segment, column by column.

    Attributes:
        keys: [n, 16] uint8.
        logps: [n] fp64, summed over the answer, in nats.
        num_tokens: [n] int32, of the answer.
        offsets: [n + 1] int32, where in `per_token_logps` each row begins.
        per_token_logps: [T] fp32, in nats.
    """

    keys: np.ndarray
    logps: np.ndarray
    num_tokens: np.ndarray
    offsets: np.ndarray
    per_token_logps: np.ndarray

    def per_token(self, row: int) -> np.ndarray:  # [num_tokens[row]]
        return self.per_token_logps[self.offsets[row] : self.offsets[row + 1]]

    def take(self, rows: np.ndarray) -> Columns:
        """A copy of these rows [m], in their order."""
        parts = [self.per_token(row) for row in rows.tolist()]
        lengths = [len(part) for part in parts]
        return Columns(
            keys=self.keys[rows],
            logps=self.logps[rows],
            num_tokens=self.num_tokens[rows],
            offsets=np.cumsum([0, *lengths], dtype=np.int32),
            per_token_logps=np.concatenate([np.empty(0, np.float32), *parts]),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Columns]) -> Columns:
        """All rows of these, one after the other."""
        lengths = [np.diff(part.offsets) for part in parts]
        return cls(
            keys=np.concatenate([part.keys for part in parts]),
            logps=np.concatenate([part.logps for part in parts]),
            num_tokens=np.concatenate([part.num_tokens for part in parts]),
            offsets=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int32),
            per_token_logps=np.concatenate([part.per_token_logps for part in parts]),
        )

    def checksums(self, identity: bytes, rows: np.ndarray) -> list[int]:
        """XXH3-64 of the identity's digest and everything in each of these rows."""
        heads = np.empty(len(rows), _ROW_HEAD)
        heads["identity"] = np.void(identity)
        heads["key"] = self.keys[rows].view(f"V{KEY_BYTES}").ravel()
        heads["logp"] = self.logps[rows]
        heads["num_tokens"] = self.num_tokens[rows]
        head_bytes, size = heads.tobytes(), _ROW_HEAD.itemsize
        values = self.per_token_logps.data.cast("B")
        # A damaged offset cuts out other bytes, or fewer: another checksum, never a crash.
        starts = (4 * self.offsets[rows].astype(np.int64)).tolist()
        ends = (4 * self.offsets[rows + 1].astype(np.int64)).tolist()
        return [
            xxh3_64_intdigest(head_bytes[size * i : size * (i + 1)] + values[start:end])
            for i, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]


def write_segment(folder: Path, identity: bytes, columns: Columns, rank: int) -> Path:
    """Commit rows as a new segment; once this returns they survive a kill and a power loss.

    Args:
        folder: of the namespace.
        identity: the 16 bytes of the identity's digest.
        rank: of the process, for the name.

    Raises:
        ReferenceStoreError: the disk is full, or can't be written.
    """
    num_rows = len(columns.keys)
    checksums = columns.checksums(identity, np.arange(num_rows))
    arrays = [
        pa.FixedSizeBinaryArray.from_buffers(
            SCHEMA.field("key").type, num_rows, [None, pa.py_buffer(columns.keys.tobytes())]
        ),
        pa.array(columns.logps),
        pa.array(columns.num_tokens),
        pa.ListArray.from_arrays(
            pa.array(columns.offsets),
            pa.array(columns.per_token_logps),
            type=SCHEMA.field("per_token_logps").type,
        ),
        pa.array(checksums, pa.uint64()),
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
    content = sink.getvalue()
    path = folder / f"{uuid.uuid4().hex}-{rank}-{xxh3_128_hexdigest(content)}.arrow"
    write_durably(path, content)
    return path


def damaged(path: Path, what: str) -> ReferenceStoreError:
    return ReferenceStoreError(
        f"{path} is damaged ({what}): run `dpofast ref verify` to see what else is, and delete "
        "that file; its rows are scored again by the next build."
    )


class Segment:
    """A segment that was opened for reading: mapped into memory, keys aside nothing is read yet.

    Args:
        path: of the file.
        identity: the 16 bytes of the digest that its rows should be of.

    Raises:
        ReferenceStoreError: it can't be opened, or isn't a segment of this format.
    """

    def __init__(self, path: Path, identity: bytes) -> None:
        self.path, self.identity = path, identity
        try:
            self.columns, self._checksums = _map_columns(path)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise damaged(
                path, str(error).splitlines()[0] if str(error) else "unreadable"
            ) from error

    def __len__(self) -> int:
        return len(self.columns.keys)

    def check(self, rows: np.ndarray) -> None:
        """Raise ReferenceStoreError unless these rows [m] are as they were written."""
        made = self.columns.checksums(self.identity, rows)
        stored = self._checksums[rows].tolist()
        if made == stored:
            return
        bad = [int(row) for row, a, b in zip(rows, made, stored, strict=True) if a != b]
        raise damaged(self.path, f"wrong checksum of {len(bad)} rows, the first is {bad[0]}")


def _map_columns(path: Path) -> tuple[Columns, np.ndarray]:
    """Columns that look into the mapped file, and the rows' checksums [n] uint64."""
    # Closing the file leaves the mapping to the arrays, and the descriptor to others.
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        if not reader.schema.equals(SCHEMA, check_metadata=True):
            raise ValueError("it does not hold the columns of this format")
        if reader.num_record_batches != 1:
            raise ValueError(f"{reader.num_record_batches} record batches instead of 1")
        batch = reader.get_batch(0)
    batch.validate()
    num_rows = batch.num_rows
    if not num_rows:
        raise ValueError("no rows")
    per_token = batch.column(3)
    values = per_token.values
    columns = Columns(
        keys=_view(batch.column(0), np.uint8, KEY_BYTES * num_rows).reshape(-1, KEY_BYTES),
        logps=_view(batch.column(1), np.dtype("<f8"), num_rows),
        num_tokens=_view(batch.column(2), np.dtype("<i4"), num_rows),
        offsets=_view(per_token, np.dtype("<i4"), num_rows + 1),
        per_token_logps=_view(values, np.dtype("<f4"), len(values)),
    )
    return columns, _view(batch.column(4), np.dtype("<u8"), num_rows)


def _view(array: pa.Array, dtype: np.dtype | type, count: int) -> np.ndarray:
    """A column's bytes as they lie in the file; ValueError where they are too few."""
    if array.null_count or array.offset:
        raise ValueError("a column has gaps")
    buffer = array.buffers()[1]
    return np.frombuffer(b"" if buffer is None else buffer, dtype, count)
