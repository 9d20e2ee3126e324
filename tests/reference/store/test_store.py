from __future__ import annotations

import json
import os

import numpy as np
import pytest

from dpofast.errors import ReferenceStoreError
from dpofast.reference.store import files
from dpofast.reference.store.store import ReferenceStore
from tests.reference.stubs import ROWS, identity, write


def test_each_reference_has_rows_of_its_own(tmp_path):
    write(tmp_path)
    other = identity(attention="eager")
    namespace = write(tmp_path, {bytes(16): np.float32([-1])}, other)
    namespace.refresh()
    assert not namespace.lookup(list(ROWS)[1:])[1].any()
    store = ReferenceStore.open(tmp_path)
    assert store.digests() == sorted([identity().digest, other.digest])
    assert store.identity(other.digest) == other


def test_opening_does_not_make_folders_for_references(tmp_path):
    store = ReferenceStore.open(tmp_path / "a" / "b", create=True)
    namespace = store.namespace(identity())
    assert not namespace.lookup([bytes(16)])[1].any()
    assert os.listdir(store.folder) == ["store.json"]


def test_a_folder_that_is_not_a_store_is_refused(tmp_path):
    with pytest.raises(ReferenceStoreError, match="no reference store in"):
        ReferenceStore.open(tmp_path / "nothing")
    with pytest.raises(ReferenceStoreError, match="no reference store in"):
        ReferenceStore.open(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    for create in (False, True):
        with pytest.raises(ReferenceStoreError, match=r"thesis\.tex.*choose"):
            ReferenceStore.open(tmp_path, create=create)
    with pytest.raises(ReferenceStoreError, match="not a file"):
        ReferenceStore.open(tmp_path / "thesis.tex", create=True)


def test_a_folder_where_another_process_is_making_the_store_is_not_refused(tmp_path):
    (tmp_path / f"{files.TEMPORARY_PREFIX}1").write_text("{")
    assert ReferenceStore.open(tmp_path, create=True).digests() == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": "dpofast reference store", "version": 0}, "version 0.*reads version 1.*delete"),
        ({"format": "dpofast reference store", "version": 2}, "version 2.*use the dpofast that"),
        ({"format": "dpofast reference store", "version": "1"}, "version '1'"),
        ({"format": "another", "version": 1}, "another"),
        ({"version": 1}, "damaged"),
        ([], "damaged"),
    ],
)
def test_a_store_of_another_version_is_refused(tmp_path, content, message):
    write(tmp_path)
    (tmp_path / "store.json").write_text(json.dumps(content))
    with pytest.raises(ReferenceStoreError, match=message):
        ReferenceStore.open(tmp_path, create=True)


def test_a_damaged_identity_is_named(tmp_path):
    namespace = write(tmp_path)
    path = namespace.folder / "identity.json"
    path.write_text(path.read_text().replace("sdpa", "sdpb"))
    with pytest.raises(ReferenceStoreError, match=r"identity\.json can't be read"):
        ReferenceStore(namespace.store_folder).identity(identity().digest)
