"""Reads damaged data files, one after the other; for test_damaged_files.py.

python damaged_files.py FOLDER FIRST LAST KIND...

Case N damages a file of kind N modulo the number of kinds. Each case prints a line before it reads
the file, which names the case, and one with what came of it. A crash ends the process.
"""

from __future__ import annotations

import gzip
import json
import random
import signal
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet

from dpofast.data import load_preferences
from dpofast.errors import DataError

WORDS = ["alpha", "beta", "gamma", "delta", "häß", "日本", "😀"]


def rows() -> list[dict]:
    rng = random.Random(0)

    def message(role: str) -> list[dict]:
        return [{"role": role, "content": " ".join(rng.choices(WORDS, k=8))}]

    return [
        {
            "prompt": message("user"),
            "chosen": message("assistant"),
            "rejected": message("assistant"),
        }
        for _ in range(60)
    ]


def write(folder: Path, kind: str) -> tuple[Path, Path]:
    """Write the rows; the file to damage, and the source to read."""
    file = folder / kind / f"data.{kind.partition('-')[0]}"
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows())
    match kind:
        case "arrow-file" | "arrow-zstd":
            compression = "zstd" if kind == "arrow-zstd" else None
            options = pa.ipc.IpcWriteOptions(compression=compression)
            with pa.ipc.new_file(str(file), table.schema, options=options) as writer:
                writer.write_table(table, max_chunksize=20)
        case "arrow-stream":
            with pa.ipc.new_stream(str(file), table.schema) as writer:
                writer.write_table(table, max_chunksize=20)
        case "parquet" | "parquet-snappy":
            compression = "snappy" if kind == "parquet-snappy" else "none"
            pa.parquet.write_table(table, file, row_group_size=20, compression=compression)
        case "jsonl.gz":
            text = "".join(f"{json.dumps(row)}\n" for row in rows())
            file.write_bytes(gzip.compress(text.encode()))
        case "json.gz":
            file.write_bytes(gzip.compress(json.dumps(rows()).encode()))
        case "saved" | "saved-info":
            saved = file.parent / "dataset"
            datasets.Dataset.from_list(rows()).save_to_disk(saved)
            name = "dataset_info.json" if kind == "saved-info" else "data-00000-of-00001.arrow"
            return saved / name, saved
    return file, file


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What was done, and the damaged content: cut short, with flipped bits, or partly replaced."""
    how = rng.choice(["cut", "flip", "splice"])
    place = rng.randrange(len(data))
    if how == "cut":
        return how, data[:place]
    bad = bytearray(data)
    if how == "flip":
        for _ in range(rng.choice([1, 1, 1, 4])):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        return how, bytes(bad)
    size = rng.choice([1, 4, 8, 64, 512])
    new = rng.choice([b"", bytes(size), b"\xff" * size, rng.randbytes(size), data[:size]])
    bad[place : place + size] = new
    return how, bytes(bad)


def read(file: Path, source: Path, whole: list[dict]) -> str:
    try:
        found = load_preferences(str(source)).to_list()
    except DataError as error:
        is_named = str(file) in str(error) or str(source) in str(error)
        return "refused" if is_named else f"unnamed: {error}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    if found == whole:
        return "same"
    return "other texts" if len(found) == len(whole) else "other rows"


def main(folder: Path, first: int, last: int, kinds: list[str]) -> None:
    datasets.disable_progress_bars()
    places = {kind: write(folder, kind) for kind in kinds}
    contents = {kind: file.read_bytes() for kind, (file, _) in places.items()}
    whole = load_preferences(rows()).to_list()
    for case in range(first, last):
        kind = kinds[case % len(kinds)]
        file, source = places[kind]
        how, content = damaged(contents[kind], random.Random(case))
        file.write_bytes(content)
        print(case, kind, how, flush=True)
        signal.alarm(60)  # ends the process if a file is read without an end
        print(json.dumps(read(file, source, whole)), flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
