from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from dpofast.data import load_preferences
from dpofast.errors import DataError

ROWS = [
    {"prompt": f"prompt {i} ", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(60)
]
TABLE = pa.Table.from_pylist(ROWS)
DAMAGED = "the file is damaged or was cut short; write or download it again"


def stream(path: Path) -> list[int]:
    """Write three batches as a stream; the place after each of them."""
    places = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, TABLE.schema) as writer:
        for batch in TABLE.to_batches(max_chunksize=20):
            writer.write_batch(batch)
            places.append(sink.tell())
    return places


def refused(path: Path, what: str = DAMAGED, source: Path | None = None) -> None:
    with pytest.raises(DataError) as caught:
        load_preferences(str(source or path))
    assert str(path) in str(caught.value)
    assert what in str(caught.value)


def test_a_stream_cut_between_messages_loses_no_rows_silently(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    places = stream(path)
    assert len(load_preferences(str(path))) == 60
    content = path.read_bytes()
    for place in places:
        path.write_bytes(content[:place])
        refused(path, "doesn't end as a stream of Arrow does")
    for place in places[:-1]:  # an end in the middle
        path.write_bytes(content[:place] + b"\xff\xff\xff\xff\0\0\0\0" + content[place:])
        refused(path, "doesn't end as a stream of Arrow does")


def test_a_stream_in_the_oldest_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    options = pa.ipc.IpcWriteOptions(use_legacy_format=True)
    with pa.ipc.new_stream(str(path), TABLE.schema, options=options) as writer:
        writer.write_table(TABLE)
    assert len(load_preferences(str(path))) == 60
    path.write_bytes(path.read_bytes()[:-4])
    refused(path, "doesn't end")


def bad_offsets() -> pa.Array:
    """Texts of which the second has an offset far beyond the end."""
    good = TABLE["chosen"].chunk(0)
    offsets = bytearray(good.buffers()[1].to_pybytes())
    offsets[8:12] = (1 << 30).to_bytes(4, "little")
    return pa.Array.from_buffers(
        pa.string(), len(good), [None, pa.py_buffer(bytes(offsets)), good.buffers()[2]]
    )


def test_offsets_beyond_the_end_are_refused(tmp_path: Path) -> None:
    bad = TABLE.set_column(1, "chosen", bad_offsets())
    for name, writer_of in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        path = tmp_path / f"{name}.arrow"
        with writer_of(str(path), bad.schema) as writer:
            writer.write_table(bad)
        refused(path)


def test_a_dataset_with_damage_is_refused(tmp_path: Path) -> None:
    """Neither its rows nor a selection of them are made of damaged offsets."""
    table = TABLE.set_column(1, "chosen", bad_offsets())
    bad = datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="bad")
    for dataset in (bad, bad.select([50, 3, 7])):
        with pytest.raises(DataError, match=r"the pairs can't be read .*damaged"):
            load_preferences(dataset, name="the pairs")
    folder = tmp_path / "saved"
    datasets.Dataset(TABLE).save_to_disk(folder)
    (path,) = folder.glob("*.arrow")
    mapped = datasets.load_from_disk(str(folder))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"good 30", b"good \xff\xff"))
    refused(path, source=folder)
    del mapped
    path.write_bytes(content[:-8])
    refused(path, "doesn't end as a stream of Arrow does", source=folder)
    (folder / "dataset_info.json").write_text('{"features": {"prompt": 1}}')
    refused(folder, "damaged or missing; save or download it again")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pa.parquet.write_table(TABLE, path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"good 30", b"good \xff\xff"))
    refused(path, "Invalid UTF8 sequence")


def test_checksums_of_parquet_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    options = {"compression": "none", "use_dictionary": False}
    pa.parquet.write_table(TABLE, path, write_page_checksum=True, **options)
    path.write_bytes(path.read_bytes().replace(b"good 30", b"evil 30"))
    refused(path, "could not verify page integrity")


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz"])
def test_damaged_gzip_is_refused(tmp_path: Path, name: str) -> None:
    text = json.dumps(ROWS) if name == "rows.json.gz" else "\n".join(map(json.dumps, ROWS))
    path, content = tmp_path / name, bytearray(gzip.compress(text.encode()))
    content[100] ^= 0xFF
    path.write_bytes(content)
    refused(path)
    path.write_bytes(gzip.compress(text.encode())[:-20])
    refused(path)
