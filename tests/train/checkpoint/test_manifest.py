"""A manifest says of every file of a checkpoint whether it is as it was saved."""

from __future__ import annotations

import json
import random

import pytest
import xxhash

from dpofast.train.checkpoint.manifest import (
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    ManifestError,
    hash_file,
    hash_files,
    verify,
)
from tests.train.checkpoint.folders import DAMAGE, RUN, files_of, flip_a_bit, make_checkpoint


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    records = {"b/c.pt": FileRecord(5, "0" * 32), "a.json": FileRecord(7, "f" * 32)}
    manifest = Manifest(RUN, 12, 8, records)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    content = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert list(content) == ["format", "run_id", "step", "ranks", "files", "digest"]
    assert content["files"]["b/c.pt"] == {"size": 5, "xxh3_128": "0" * 32}


def test_hashes_are_those_of_xxhash_over_any_number_of_blocks(tmp_path):
    rng = random.Random(0)
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 21) + 5):
        (tmp_path / str(size)).write_bytes(rng.randbytes(size))
    found = hash_files(tmp_path, [path.name for path in tmp_path.iterdir()], to_disk=True)
    for path in tmp_path.iterdir():
        expected = xxhash.xxh3_128_hexdigest(path.read_bytes())
        assert found[path.name] == FileRecord(int(path.name), expected) == hash_file(path)


def test_a_checkpoint_as_it_was_saved_has_no_faults(tmp_path):
    folder = make_checkpoint(tmp_path, 4)
    assert verify(folder) == []
    (folder / "latest_universal").write_text("global_step4_universal")  # of a conversion
    assert verify(folder) == []


@pytest.mark.parametrize("way", DAMAGE)
def test_every_damaged_file_is_named(tmp_path, way):
    names = [path.relative_to(tmp_path) for path in files_of(make_checkpoint(tmp_path / "0", 4))]
    for index, name in enumerate(names, 1):
        folder = make_checkpoint(tmp_path / str(index), 4)
        file = name.relative_to("0/checkpoint-4").as_posix()
        DAMAGE[way](folder / file)
        for hashes in (True, False):
            (fault,) = verify(folder, hashes)
            assert fault.file == file
        if file != MANIFEST_FILE:
            words = {
                "deleted": "is missing",
                "emptied": "is empty instead of",
                "truncated": "is truncated to",
                "lengthened": "is longer than it was",
                "replaced by a folder": "is no file",
            }
            assert fault.problem.startswith(words[way])


def test_a_changed_bit_is_noticed_by_its_hash_only(tmp_path):
    folder = make_checkpoint(tmp_path, 4)
    flip_a_bit(folder / "optimizer.pt", random.Random(0))
    assert verify(folder, hashes=False) == []
    (fault,) = verify(folder)
    assert str(fault) == "optimizer.pt has changed, as its checksum is another"


def test_all_faults_are_listed(tmp_path):
    folder = make_checkpoint(tmp_path, 4)
    (folder / "scheduler.pt").unlink()
    flip_a_bit(folder / "model.safetensors", random.Random(0))
    assert [fault.file for fault in verify(folder)] == ["model.safetensors", "scheduler.pt"]


def test_every_bit_of_the_manifest_counts(tmp_path):
    folder = make_checkpoint(tmp_path, 4, contents={})
    path = folder / MANIFEST_FILE
    written = path.read_bytes()
    for place in range(8 * len(written)):
        flipped = bytearray(written)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ManifestError, match="damaged, as it doesn't match its own digest"):
            Manifest.read(folder)


def test_the_manifest_of_a_newer_version_is_named_as_that(tmp_path):
    folder = make_checkpoint(tmp_path, 4)
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text())
    del content["digest"]
    content["format"] = 2
    digest = xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
    path.write_text(json.dumps({**content, "digest": digest}))
    with pytest.raises(ManifestError, match="newer version"):
        Manifest.read(folder)
