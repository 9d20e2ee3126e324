"""A store that an earlier version wrote is read to the last bit, or refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from dpofast.errors import ReferenceStoreError
from dpofast.reference.store.info import info
from dpofast.reference.store.prune import prune
from dpofast.reference.store.store import ReferenceStore
from dpofast.reference.store.verify import verify
from tests.reference import golden_store as golden


def assert_rows(folder):
    """Assert that a store has exactly the rows of the golden store."""
    store = ReferenceStore.open(folder)
    assert store.digests() == sorted([golden.BASE_DIGEST, golden.TUNED_DIGEST])
    for digest in store.digests():
        reference = store.identity(digest)
        rows = store.namespace(reference).read(golden.keys())
        assert rows.found.all()
        assert rows.logps.tolist() == golden.LOGPS
        assert rows.details.tolist() == golden.DETAILS[reference]
        for place, (_, answer, logps, logsumexps) in enumerate(golden.ANSWERS):
            detail = rows.details[place]
            assert rows.num_tokens[place] == len(answer)
            wanted = np.float32(logps if detail >= 1 else [])
            np.testing.assert_array_equal(rows.per_token_logps[place], wanted)
            wanted = np.float32(logsumexps if detail >= 2 else [])
            np.testing.assert_array_equal(rows.per_token_logsumexps[place], wanted)
    assert verify(folder).ok


def contents(folder):
    """-> the bytes of each file by its name; segments without the random part of their name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.name.split("-", 1)[1] if path.suffix == ".arrow" else path.name
            found[f"{path.parent.name if path.parent != folder else ''}/{name}"] = path.read_bytes()
    return found


def test_the_golden_store_is_read_exactly():
    assert_rows(golden.FOLDER)
    content = info(golden.FOLDER)
    assert (content["format_version"], content["rows"]) == (1, 10)


def test_the_same_rows_are_written_to_the_same_bytes(tmp_path):
    golden.write(tmp_path / "store")
    expected = contents(golden.FOLDER)
    assert len(expected) == 1 + 2 + 4  # store.json, two references, four segments
    assert contents(tmp_path / "store") == expected


def test_the_golden_store_can_be_pruned(tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(golden.FOLDER, folder)
    assert prune(folder).duplicates == 2
    assert_rows(folder)


@pytest.mark.parametrize("version", [0, 2])
def test_another_version_is_refused_with_what_to_do(tmp_path, version):
    folder = tmp_path / "store"
    shutil.copytree(golden.FOLDER, folder)
    path = folder / "store.json"
    path.write_text(json.dumps({"format": "dpofast reference store", "version": version}))
    for create in (False, True):
        with pytest.raises(ReferenceStoreError) as refused:
            ReferenceStore.open(folder, create=create)
        assert str(refused.value) == (
            f"{path} says 'dpofast reference store' version {version}, and this dpofast reads "
            "version 1: use the dpofast that wrote it, or choose another folder, or delete this "
            "one (its rows are then scored again)."
        )
