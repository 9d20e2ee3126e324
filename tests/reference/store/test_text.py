from __future__ import annotations

from dpofast.reference.store.text import human_bytes


def test_sizes_are_written_for_people():
    assert [human_bytes(n) for n in (0, 999, 1000, 12_345_678)] == [
        "0 B", "999 B", "1.0 kB", "12.3 MB",
    ]  # fmt: skip
