from __future__ import annotations

from dpofast.reference.store.text import counted, human_bytes


def test_sizes_and_counts_are_written_for_people():
    assert [human_bytes(n) for n in (0, 999, 1000, 12_345_678)] == [
        "0 B", "999 B", "1.0 kB", "12.3 MB",
    ]  # fmt: skip
    assert [counted(n, "row") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
