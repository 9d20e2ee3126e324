from __future__ import annotations

import numpy as np
import pytest

from dpofast.reference.store import info as listing
from dpofast.reference.store.info import describe, info
from dpofast.reference.store.store import ReferenceStore
from tests.reference.mixed_store import ROWS, mixed_store, segment_of
from tests.reference.stubs import identity


@pytest.fixture
def store(tmp_path):
    return mixed_store(tmp_path / "store")


def test_info_counts_and_says_what_the_reference_was(store):
    writer = store.namespace(identity(attention="eager")).writer()
    for _ in range(2):
        writer.add(bytes(16), np.float32([-1]))
        writer.commit()
    content = info(store.folder)
    assert content["format_version"] == 1
    assert content["rows"] == 4
    by_digest = {reference["digest"]: reference for reference in content["references"]}
    other = by_digest[identity(attention="eager").digest]
    assert (other["rows"], other["tokens"], other["segments"]) == (1, 1, 2)
    mixed = by_digest[identity().digest]
    assert (mixed["rows_with_logps"], mixed["rows_with_logsumexps"]) == (2, 1)
    assert mixed["tokens"] == sum(map(len, ROWS.values()))
    assert other["description"]["attention"] == "eager"
    assert other["first_written"] <= other["last_written"]
    text = "\n".join(describe(store.folder))
    assert "4 rows of 2 references" in text
    assert "positions: rope_theta 10000.0" in text
    assert "attention: eager" in text
    assert "rows: 1 answer of 1 token in 2 segments" in text
    assert (
        "stored: summed log-probs of all rows, per-token log-probs of 2, log-sum-exps of 1" in text
    )


def test_a_segment_that_a_prune_merges_meanwhile_is_not_counted(store, monkeypatch):
    """It is listed, and gone when its size is read."""
    name = segment_of(store).name.replace("-", "0-", 1)[1:]  # another segment's name
    listed = listing.list_names
    monkeypatch.setattr(listing, "list_names", lambda folder: [*listed(folder), name])
    assert info(store.folder)["references"][0]["segments"] == 1


def test_an_empty_store_has_no_references(tmp_path):
    ReferenceStore.open(tmp_path, create=True)
    assert info(tmp_path)["references"] == []
    assert len(describe(tmp_path)) == 1
