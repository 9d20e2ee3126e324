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
from dpofast.reference.store.files import naming_errors, write_durably
from dpofast.reference.store.keys import KEY_BYTES

FORMAT_VERSION = 1
_FLOATS = pa.list_(pa.field("item", pa.float32(), nullable=False))
# No column is nullable: a validity bitmap's bits would need a checksum of their own.
SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("logp", pa.float64(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("per_token_logps", _FLOATS, nullable=False),
        pa.field("per_token_logsumexps", _FLOATS, nullable=False),
        pa.field("checksum", pa.uint64(), nullable=False),
    ],
    metadata={"format": "dpofast reference segment", "version": str(FORMAT_VERSION)},
)
# <unique>-<rank>-<XXH3-128 of the file's bytes>.arrow
NAME_PATTERN = re.compile(r"[0-9a-f]{32}-[0-9]+-(?P<checksum>[0-9a-f]{32})\.arrow")

_LENGTHS = ("num_logps", "num_logsumexps")
# What of a row comes before its floats under its checksum; packed, 52 bytes.
_ROW_HEAD = np.dtype(
    [
        ("identity", "V16"),
        ("key", "V16"),
        ("logp", "<f8"),
        ("num_tokens", "<i4"),
        *((name, "<i4") for name in _LENGTHS),
    ],
    align=False,
)
ROW_BYTES = 44  # of a segment, beside the floats: key, logp, num_tokens, two offsets, checksum


@dataclass(frozen=True)
class FloatLists:
    """A list of floats for each row.

    Attributes:
        values: [T] fp32, the lists one after another.
        offsets: [n + 1] int32; list i is values[offsets[i]:offsets[i + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, lists: Sequence[np.ndarray]) -> FloatLists:
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int32)
        return cls(np.concatenate([np.empty(0, np.float32), *lists]), offsets)

    def __getitem__(self, row: int) -> np.ndarray:
        values: np.ndarray = self.values[self.offsets[row] : self.offsets[row + 1]]
        return values

    @property
    def lengths(self) -> np.ndarray:  # [n] int64
        return np.diff(self.offsets.astype(np.int64))

    def take(self, rows: np.ndarray) -> FloatLists:
        return FloatLists.of([self[row] for row in rows.tolist()])

    @classmethod
    def concatenate(cls, parts: Sequence[FloatLists]) -> FloatLists:
        lengths = np.concatenate([part.lengths for part in parts])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return cls(np.concatenate([part.values for part in parts]), offsets)

    def spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in `values` the list of each row [m] begins and ends: [m] int64 each."""
        offsets = self.offsets
        return offsets[rows].astype(np.int64), offsets[rows + 1].astype(np.int64)


@dataclass(frozen=True)
class Columns:
    """The rows of a segment, column by column.

    Attributes:
        keys: [n, 16] uint8.
        logps: [n] fp64, summed over the answer, in nats.
        num_tokens: [n] int32, of the answer.
        per_token_logps: in nats; of each row `num_tokens` values, or none where not stored.
        per_token_logsumexps: likewise; none without `per_token_logps`.
    """

    keys: np.ndarray
    logps: np.ndarray
    num_tokens: np.ndarray
    per_token_logps: FloatLists
    per_token_logsumexps: FloatLists

    @property
    def details(self) -> np.ndarray:  # [n] int8, of the values of RowDetail
        has_logps = self.per_token_logps.lengths == self.num_tokens
        has_both = has_logps & (self.per_token_logsumexps.lengths == self.num_tokens)
        return has_logps.astype(np.int8) + has_both

    @property
    def row_bytes(self) -> np.ndarray:  # [n] int64, that each row takes in a segment
        return ROW_BYTES + 4 * (self.lists[0].lengths + self.lists[1].lengths)

    @property
    def lists(self) -> tuple[FloatLists, FloatLists]:
        return self.per_token_logps, self.per_token_logsumexps

    def take(self, rows: np.ndarray) -> Columns:
        """A copy of these rows [m], in their order."""
        return Columns(
            self.keys[rows],
            self.logps[rows],
            self.num_tokens[rows],
            self.per_token_logps.take(rows),
            self.per_token_logsumexps.take(rows),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Columns]) -> Columns:
        """All rows of these, one after the other."""
        return cls(
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.logps for part in parts]),
            np.concatenate([part.num_tokens for part in parts]),
            FloatLists.concatenate([part.per_token_logps for part in parts]),
            FloatLists.concatenate([part.per_token_logsumexps for part in parts]),
        )

    def are_whole(self, rows: np.ndarray) -> np.ndarray:  # [m] bool
        """Whether the lists of these rows [m] have a float for each token, or none."""
        num_tokens = self.num_tokens[rows]
        (logp_starts, logp_ends), (sum_starts, sum_ends) = (x.spans(rows) for x in self.lists)
        num_logps, num_logsumexps = logp_ends - logp_starts, sum_ends - sum_starts
        whole: np.ndarray = (num_logps == num_tokens) | (num_logps == 0)
        whole &= (num_logsumexps == num_logps) | (num_logsumexps == 0)
        return whole

    def checksums(self, identity: bytes, rows: np.ndarray) -> list[int]:
        """XXH3-64 of the identity's digest and everything in each of these rows."""
        heads = np.empty(len(rows), _ROW_HEAD)
        heads["identity"] = np.void(identity)
        heads["key"] = self.keys[rows].view(f"V{KEY_BYTES}").ravel()
        heads["logp"] = self.logps[rows]
        heads["num_tokens"] = self.num_tokens[rows]
        parts, spans = [], []
        for name, lists in zip(_LENGTHS, self.lists, strict=True):
            starts, ends = lists.spans(rows)
            heads[name] = ends - starts
            parts.append(lists.values.view(np.uint8).data)
            # A damaged offset cuts out other bytes, or fewer: another checksum, never a crash.
            spans += [(4 * starts).tolist(), (4 * ends).tolist()]
        head_bytes, size = heads.tobytes(), _ROW_HEAD.itemsize
        logps, logsumexps = parts
        return [
            xxh3_64_intdigest(head_bytes[i : i + size] + logps[a:b] + logsumexps[c:d])
            for i, a, b, c, d in zip(range(0, len(head_bytes), size), *spans, strict=True)
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
        *(
            pa.ListArray.from_arrays(pa.array(lists.offsets), pa.array(lists.values), type=_FLOATS)
            for lists in columns.lists
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
    """A segment that was opened for reading: mapped into memory, the floats aren't read yet.

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
            if isinstance(error, OSError) and error.errno:  # the system's; Arrow's own have none
                with naming_errors("read", path):
                    raise
            raise damaged(
                path, str(error).splitlines()[0] if str(error) else "unreadable"
            ) from error

    def __len__(self) -> int:
        return len(self.columns.keys)

    def check(self, rows: np.ndarray) -> None:
        """Raise ReferenceStoreError unless these rows [m] are as they were written."""
        made = self.columns.checksums(self.identity, rows)
        stored = self._checksums[rows].tolist()
        if made != stored:
            bad = [int(row) for row, a, b in zip(rows, made, stored, strict=True) if a != b]
            raise damaged(self.path, f"wrong checksum of {len(bad)} rows, the first is {bad[0]}")
        whole = self.columns.are_whole(rows)
        if not whole.all():
            bad = rows[~whole].tolist()
            raise damaged(self.path, f"row {bad[0]} has other floats than one for each token")


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
    columns = Columns(
        keys=_view(batch.column(0), np.uint8, KEY_BYTES * num_rows).reshape(-1, KEY_BYTES),
        logps=_view(batch.column(1), np.dtype("<f8"), num_rows),
        num_tokens=_view(batch.column(2), np.dtype("<i4"), num_rows),
        per_token_logps=_view_lists(batch.column(3)),
        per_token_logsumexps=_view_lists(batch.column(4)),
    )
    return columns, _view(batch.column(5), np.dtype("<u8"), num_rows)


def _view_lists(array: pa.ListArray) -> FloatLists:
    values = array.values
    return FloatLists(
        values=_view(values, np.dtype("<f4"), len(values)),
        offsets=_view(array, np.dtype("<i4"), len(array) + 1),
    )


def _view(array: pa.Array, dtype: np.dtype | type, count: int) -> np.ndarray:
    """A column's bytes as they lie in the file; ValueError where they are too few."""
    if array.null_count or array.offset:
        raise ValueError("a column has gaps")
    buffer = array.buffers()[1]
    return np.frombuffer(b"" if buffer is None else buffer, dtype, count)
