"""Reads and writes a store as docs/reference-store.md says, without the store's own code."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import uuid

import numpy as np
import pyarrow as pa
import pytest
from xxhash import xxh3_64_intdigest, xxh3_128_digest, xxh3_128_hexdigest

from dpofast.errors import ReferenceStoreError
from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.builder import BuildOptions, build_reference
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore
from dpofast.reference.store.verify import verify
from tests.reference.stubs import StubScorer, batches_of, identity, pairs, stub_logps


def key_of(prompt, answer):
    ids = [len(prompt), *prompt, len(answer), *answer]
    return xxh3_128_digest(struct.pack(f"<{len(ids)}q", *ids))


def checksum_of(digest, key, logp, num_tokens, logps, logsumexps=()):
    head = struct.pack("<diii", logp, num_tokens, len(logps), len(logsumexps))
    floats = [*logps, *logsumexps]
    return xxh3_64_intdigest(
        bytes.fromhex(digest) + key + head + struct.pack(f"<{len(floats)}f", *floats)
    )


def test_a_store_reads_as_documented(tmp_path):
    dataset = pairs(5)
    rows = ReferenceStore.open(tmp_path, create=True).namespace(identity())
    options = BuildOptions(progress=False)
    answers = read_answers(dataset)
    build_reference(rows, answers, StubScorer(), batches=batches_of(4), options=options)

    content = json.loads((tmp_path / "store.json").read_text())
    assert content == {"format": "dpofast reference store", "version": 1}
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    content = json.loads((folder / "identity.json").read_text())
    text = json.dumps(content["description"], sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest()[:32] == content["digest"] == folder.name

    (path,) = folder.glob("*.arrow")
    name = re.fullmatch(r"[0-9a-f]{32}-(\d+)-([0-9a-f]{32})\.arrow", path.name)
    assert name[1] == "0"
    assert name[2] == xxh3_128_hexdigest(path.read_bytes())
    table = pa.ipc.open_file(path).read_all()
    assert table.schema.metadata == {b"format": b"dpofast reference segment", b"version": b"1"}
    stored = {row["key"]: row for row in table.to_pylist()}
    for pair in dataset:
        for side in ("chosen_ids", "rejected_ids"):
            row = stored.pop(key_of(pair["prompt_ids"], pair[side]))
            values = stub_logps(pair["prompt_ids"], pair[side])
            assert row["per_token_logps"] == values.tolist()
            assert row["per_token_logsumexps"] == []
            assert row["num_tokens"] == len(values)
            assert row["logp"] == values.sum(dtype=np.float64)
            checksum = checksum_of(folder.name, row["key"], row["logp"], len(values), values)
            assert row["checksum"] == checksum
    assert not stored


def write_one_row(folder, num_tokens, logps, logsumexps):
    """Write a store with one row; -> its key."""
    digest = identity().digest
    namespace = folder / digest
    namespace.mkdir()
    for path, content in (
        (folder / "store.json", {"format": "dpofast reference store", "version": 1}),
        (namespace / "identity.json", {"digest": digest, "description": identity().description}),
    ):
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    floats = pa.list_(pa.field("item", pa.float32(), nullable=False))
    types = {
        "key": pa.binary(16),
        "logp": pa.float64(),
        "num_tokens": pa.int32(),
        "per_token_logps": floats,
        "per_token_logsumexps": floats,
        "checksum": pa.uint64(),
    }
    schema = pa.schema(
        [pa.field(name, type_, nullable=False) for name, type_ in types.items()],
        metadata={"format": "dpofast reference segment", "version": "1"},
    )
    key = key_of([1, 2], [3, 4])
    checksum = checksum_of(digest, key, -1.75, num_tokens, logps, logsumexps)
    row = [key, -1.75, num_tokens, logps, logsumexps, checksum]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        arrays = [pa.array([cell], type_) for cell, type_ in zip(row, types.values(), strict=True)]
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    content = sink.getvalue()
    name = f"{uuid.uuid4().hex}-7-{xxh3_128_hexdigest(content)}.arrow"
    (namespace / name).write_bytes(content)
    return key


@pytest.mark.parametrize("detail", RowDetail)
def test_a_store_written_as_documented_is_read(tmp_path, detail):
    logps = [-0.5, -1.25] if detail >= RowDetail.LOGPS else []
    logsumexps = [7.5, 0.25] if detail >= RowDetail.LOGSUMEXPS else []
    key = write_one_row(tmp_path, 2, logps, logsumexps)
    assert verify(tmp_path).ok
    stored = ReferenceStore.open(tmp_path).namespace(identity()).read([key])
    assert (stored.logps[0], stored.num_tokens[0], stored.details[0]) == (-1.75, 2, detail)
    assert stored.per_token_logps[0].tolist() == logps
    assert stored.per_token_logsumexps[0].tolist() == logsumexps


@pytest.mark.parametrize(
    ("num_tokens", "logps", "logsumexps"),
    [(2, [-0.5], []), (1, [-0.5, -1.25], []), (2, [-0.5, -1.25], [7.5]), (2, [], [7.5, 0.25])],
)
def test_a_row_with_other_floats_than_one_for_each_token_is_refused(
    tmp_path, num_tokens, logps, logsumexps
):
    key = write_one_row(tmp_path, num_tokens, logps, logsumexps)
    (fault,) = verify(tmp_path).faults
    assert "row 0 has other floats than one for each token" in fault
    with pytest.raises(ReferenceStoreError, match="row 0 has other floats"):
        ReferenceStore.open(tmp_path).namespace(identity()).lookup([key])
