"""Folders that look like checkpoints, and the ways to damage them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from dpofast.train.checkpoint.manifest import FileRecord, Manifest, hash_files

RUN = "run-a"
CONTENTS = {
    "model.safetensors": bytes(range(256)) * 9,
    "optimizer.pt": b"moments" * 300,
    "scheduler.pt": b"rate",
    "rng_state.pth": b"state of the generators",
    "dpofast_state.json": b'{"row_tokens": 60}\n',
    "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"shard" * 50,
}


def make_checkpoint(
    output_dir: Path, step: int, run_id: str = RUN, contents: dict[str, bytes] | None = None
) -> Path:
    """Write a whole checkpoint of a run."""
    folder = output_dir / f"checkpoint-{step}"
    contents = CONTENTS if contents is None else contents
    state = json.dumps({"global_step": step}).encode()
    for name, content in {**contents, "trainer_state.json": state}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    seal(folder, step, run_id)
    return folder


def seal(folder: Path, step: int, run_id: str = RUN) -> None:
    """Write the manifest of a folder as it is now."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    records = hash_files(folder, names)
    assert all(isinstance(record, FileRecord) for record in records.values())
    Manifest(run_id, step, 1, records).write(folder)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


DAMAGE = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "replaced by a folder": lambda path: (path.unlink(), path.mkdir()),
}
