from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("damaged_files.py")
ARROW = (
    "arrow-file",
    "arrow-stream",
    "arrow-zstd",
    "saved",
    "saved-info",
    "parquet",
    "parquet-snappy",
)
GZIP = ("jsonl.gz", "json.gz")
REFUSED = {(how, "refused") for how in ("cut", "flip", "splice")}
SAME = {("flip", "same"), ("splice", "same")}


def outcomes(folder: Path, first: int, last: int, kinds: tuple[str, ...]) -> Counter:
    """How often each (damage, outcome) was found; after a crash, it goes on with the next case."""
    found: Counter = Counter()
    while first < last:
        command = [sys.executable, str(SCRIPT), str(folder), str(first), str(last), *kinds]
        ran = subprocess.run(command, capture_output=True, text=True)
        lines = ran.stdout.splitlines()
        assert lines, ran.stderr[-2000:]
        for begun, outcome in zip(lines[::2], lines[1::2], strict=False):
            case, _, how = begun.split()
            found[how, json.loads(outcome)] += 1
            first = int(case) + 1
        if len(lines) % 2:
            case, kind, how = lines[-1].split()
            found[how, f"crash {ran.returncode} in case {case} ({kind})"] += 1
            first = int(case) + 1
    return found


def check_arrow(found: Counter, cases: int) -> None:
    # Nobody can notice another letter in a text of a file without checksums.
    allowed = REFUSED | SAME | {("flip", "other texts"), ("splice", "other texts")}
    assert set(found) <= allowed, found
    assert found.total() == cases


def check_gzip(found: Counter, cases: int) -> None:
    # gzip has a checksum of the content, but none of its header, which holds the time.
    assert set(found) <= REFUSED | SAME, found
    assert found.total() == cases


@pytest.mark.slow
def test_damaged_files_are_refused(tmp_path: Path) -> None:
    check_arrow(outcomes(tmp_path, 0, 120, ARROW), 120)
    check_gzip(outcomes(tmp_path, 0, 60, GZIP), 60)


@pytest.mark.torture
def test_damaged_arrow_is_refused(tmp_path: Path) -> None:
    check_arrow(outcomes(tmp_path, 120, 1320, ARROW), 1200)


@pytest.mark.torture
def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    check_gzip(outcomes(tmp_path, 60, 660, GZIP), 600)
