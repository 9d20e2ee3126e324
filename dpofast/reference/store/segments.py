"""Segments: immutable Arrow files, each with some rows of one reference and a checksum per row.

docs/reference-store.md describes the format; it is defined here.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from dpofast.errors import ReferenceStoreError
from dpofast.reference.identity.description import DIGEST_CHARS
from dpofast.reference.store.files import naming_errors, write_durably
from dpofast.reference.store.format import FORMAT_VERSION
from dpofast.reference.store.keys import KEY_BYTES

IDENTITY_BYTES = DIGEST_CHARS // 2  # the digest as bytes, not as hexadecimal characters
_FLOATS = pa.list_(pa.field("item", pa.float32(), nullable=False))
# No column is nullable, because the bits of a validity bitmap would need a checksum of their own.
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
# <unique>-<rank>-<XXH3-128 of the file's bytes>.arrow, as segment_name makes it
_NAME_PATTERN = re.compile(r"[0-9a-f]{32}-[0-9]+-(?P<checksum>[0-9a-f]{32})\.arrow")

_LENGTHS = ("num_logps", "num_logsumexps")
# The first part of the bytes that a row's checksum covers; the row's floats follow. These 52 bytes
# have no padding between the fields.
_ROW_HEAD = np.dtype(
    [
        ("identity", f"V{IDENTITY_BYTES}"),
        ("key", f"V{KEY_BYTES}"),
        ("logp", "<f8"),
        ("num_tokens", "<i4"),
        *((name, "<i4") for name in _LENGTHS),
    ],
    align=False,
)
# Bytes that a row takes in a segment, floats excluded: key 16, logp 8, num_tokens 4, two offsets of
# 4 each, checksum 8.
ROW_BYTES = 44


def segment_name(content: bytes | pa.Buffer, rank: int) -> str:
    """Make the name of a new segment.

    Args:
        content: bytes of the file.
        rank: rank of the process that writes it.
    """
    return f"{uuid.uuid4().hex}-{rank}-{xxh3_128_hexdigest(content)}.arrow"


def segment_names(names: Iterable[str]) -> list[str]:
    """Select the names of segments from the names in a folder."""
    return [name for name in names if _NAME_PATTERN.fullmatch(name)]


def is_named_by(name: str, content: bytes) -> bool:
    """Whether the checksum in a segment's name is the checksum of the file's bytes."""
    match = _NAME_PATTERN.fullmatch(name)
    return match is not None and match["checksum"] == xxh3_128_hexdigest(content)


@dataclass(frozen=True)
class FloatLists:
    """A list of floats for each row, all in two arrays.

    Attributes:
        values: [T] fp32, the lists one after another.
        offsets: [n + 1] int32; list i is values[offsets[i]:offsets[i + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, lists: Sequence[np.ndarray]) -> FloatLists:
        """Make the arrays from lists."""
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int32)
        return cls(np.concatenate([np.empty(0, np.float32), *lists]), offsets)

    def __getitem__(self, row: int) -> np.ndarray:
        values: np.ndarray = self.values[self.offsets[row] : self.offsets[row + 1]]
        return values

    @property
    def lengths(self) -> np.ndarray:  # [n] int64
        return np.diff(self.offsets.astype(np.int64))

    def take(self, rows: np.ndarray) -> FloatLists:
        """Copy the lists of these rows [m], in their order."""
        return FloatLists.of([self[row] for row in rows.tolist()])

    @classmethod
    def concatenate(cls, parts: Sequence[FloatLists]) -> FloatLists:
        """Copy the lists of several parts, one part after another."""
        lengths = np.concatenate([part.lengths for part in parts])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return cls(np.concatenate([part.values for part in parts]), offsets)

    def spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find where the lists of these rows [m] begin and end in `values`: [m] int64 each."""
        offsets = self.offsets
        return offsets[rows].astype(np.int64), offsets[rows + 1].astype(np.int64)


@dataclass(frozen=True)
class Columns:
    """The rows of a segment, column by column.

    Attributes:
        keys: [n, 16] uint8, hash of each row's prompt and answer.
        logps: [n] fp64, log-prob of each answer, summed over its tokens, in nats.
        num_tokens: [n] int32, tokens in each answer.
        per_token_logps: log-probs of each answer's tokens, in nats; an empty list if not stored.
        per_token_logsumexps: log-sum-exps of the logits at each answer's tokens; an empty list if
            not stored. They are stored only together with the log-probs.
    """

    keys: np.ndarray
    logps: np.ndarray
    num_tokens: np.ndarray
    per_token_logps: FloatLists
    per_token_logsumexps: FloatLists

    @property
    def details(self) -> np.ndarray:
        """The RowDetail of each row: [n] int8."""
        # RowDetail counts the lists that a row has.
        has_logps = self.per_token_logps.lengths == self.num_tokens
        has_both = has_logps & (self.per_token_logsumexps.lengths == self.num_tokens)
        return has_logps.astype(np.int8) + has_both

    @property
    def row_bytes(self) -> np.ndarray:
        """Bytes that each row takes in a segment: [n] int64."""
        return ROW_BYTES + 4 * (self.lists[0].lengths + self.lists[1].lengths)

    @property
    def lists(self) -> tuple[FloatLists, FloatLists]:
        """Log-probs and log-sum-exps, in the order of the file's columns."""
        return self.per_token_logps, self.per_token_logsumexps

    def take(self, rows: np.ndarray) -> Columns:
        """Copy these rows [m], in their order."""
        return Columns(
            self.keys[rows],
            self.logps[rows],
            self.num_tokens[rows],
            self.per_token_logps.take(rows),
            self.per_token_logsumexps.take(rows),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Columns]) -> Columns:
        """Copy the rows of several parts, one part after another."""
        return cls(
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.logps for part in parts]),
            np.concatenate([part.num_tokens for part in parts]),
            FloatLists.concatenate([part.per_token_logps for part in parts]),
            FloatLists.concatenate([part.per_token_logsumexps for part in parts]),
        )

    def are_whole(self, rows: np.ndarray) -> np.ndarray:  # [m] bool
        """Whether each list of these rows [m] has one float per token, or none at all."""
        num_tokens = self.num_tokens[rows]
        (logp_starts, logp_ends), (sum_starts, sum_ends) = (x.spans(rows) for x in self.lists)
        num_logps, num_logsumexps = logp_ends - logp_starts, sum_ends - sum_starts
        whole: np.ndarray = (num_logps == num_tokens) | (num_logps == 0)
        whole &= (num_logsumexps == num_logps) | (num_logsumexps == 0)
        return whole

    def checksums(self, identity: bytes, rows: np.ndarray) -> list[int]:
        """Compute the checksums of these rows [m].

        The XXH3-64 covers everything in the row and the reference's digest, so it no longer matches
        if a row is moved to another reference's folder.

        Args:
            identity: 16 bytes of the reference's digest.
            rows: [m] int64.
        """
        # All heads are built at once; each hash then only joins slices of bytes.
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
            # A damaged offset selects other bytes, or fewer. Python's slices then give another
            # checksum, where an index out of bounds would raise.
            spans += [(4 * starts).tolist(), (4 * ends).tolist()]
        head_bytes, size = heads.tobytes(), _ROW_HEAD.itemsize
        logps, logsumexps = parts
        return [
            xxh3_64_intdigest(head_bytes[i : i + size] + logps[a:b] + logsumexps[c:d])
            for i, a, b, c, d in zip(range(0, len(head_bytes), size), *spans, strict=True)
        ]


def write_segment(folder: Path, identity: bytes, columns: Columns, rank: int) -> Path:
    """Commit rows as a new segment. Once this returns they survive a kill and a power loss.

    Args:
        folder: folder of the namespace.
        identity: 16 bytes of the reference's digest.
        columns: rows to write.
        rank: rank of this process, used in the file's name.

    Returns:
        Path of the new file.

    Raises:
        ReferenceStoreError: the disk is full, or can't be written.
    """
    num_rows = len(columns.keys)
    checksums = columns.checksums(identity, np.arange(num_rows))
    arrays = [  # in the order of SCHEMA
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
    # The file is made in memory, because its name has the checksum of all its bytes.
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
    content = sink.getvalue()
    path = folder / segment_name(content, rank)
    write_durably(path, content)
    return path


def damaged(path: Path, what: str) -> ReferenceStoreError:
    """Make the error for a damaged segment; `what` says what is wrong with it."""
    return ReferenceStoreError(
        f"{path} is damaged ({what}): run `dpofast ref verify` to see what else is, and delete "
        "that file; its rows are scored again by the next build."
    )


class Segment:
    """A segment opened for reading.

    The file is mapped into memory, so opening it reads no floats.

    Args:
        path: file of the segment.
        identity: 16 bytes of the digest of the reference that its rows should belong to.

    Attributes:
        columns: rows of the segment, as views of the mapped file. Call `check` before using them.

    Raises:
        ReferenceStoreError: the file can't be opened, or isn't a segment of this format.
    """

    def __init__(self, path: Path, identity: bytes) -> None:
        self.path, self.identity = path, identity
        try:
            self.columns, self._checksums = _map_columns(path)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            # An errno means that the system refused; Arrow's own errors about content have none.
            if isinstance(error, OSError) and error.errno:
                with naming_errors("read", path):
                    raise
            raise damaged(
                path, str(error).splitlines()[0] if str(error) else "unreadable"
            ) from error

    def __len__(self) -> int:
        return len(self.columns.keys)

    def check(self, rows: np.ndarray) -> None:
        """Compare the checksums of these rows [m].

        Raises:
            ReferenceStoreError: a row is not as it was written.
        """
        made = self.columns.checksums(self.identity, rows)
        stored = self._checksums[rows].tolist()
        if made != stored:
            bad = [int(row) for row, a, b in zip(rows, made, stored, strict=True) if a != b]
            raise damaged(self.path, f"wrong checksum of {len(bad)} rows, the first is {bad[0]}")
        # A right checksum doesn't show that the writer was right about the lists' lengths.
        whole = self.columns.are_whole(rows)
        if not whole.all():
            bad = rows[~whole].tolist()
            raise damaged(self.path, f"row {bad[0]} has other floats than one for each token")


def _map_columns(path: Path) -> tuple[Columns, np.ndarray]:
    """Map a file into memory.

    Returns:
        Columns whose arrays are views of the mapped file, and the checksum of each row: [n] uint64.

    Raises:
        ValueError: the file isn't a segment of this format.
    """
    # Closing the file frees its descriptor, while the arrays keep the mapping alive.
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
    """View a column of lists."""
    values = array.values
    return FloatLists(
        values=_view(values, np.dtype("<f4"), len(values)),
        offsets=_view(array, np.dtype("<i4"), len(array) + 1),
    )


def _view(array: pa.Array, dtype: np.dtype | type, count: int) -> np.ndarray:
    """View a column's bytes as they are in the file, without a copy.

    Raises:
        ValueError: the column has nulls, or fewer bytes than `count` values.
    """
    if array.null_count or array.offset:
        raise ValueError("a column has gaps")
    # Buffer 0 would be the validity bitmap. An empty array can have no buffer 1 either.
    buffer = array.buffers()[1]
    return np.frombuffer(b"" if buffer is None else buffer, dtype, count)
