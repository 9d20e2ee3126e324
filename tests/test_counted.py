from __future__ import annotations

from dpofast.counted import counted


def test_a_noun_is_in_the_plural_unless_there_is_one():
    assert [counted(n, "row") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
