from __future__ import annotations

import pytest

from dpofast.ranks.member import Member, names
from dpofast.ranks.verdict import Event, Kind, judge

MEMBERS = [Member(0, "a", "a"), Member(1, "a", "a"), Member(2, "b", "b"), Member(3, "b", "b")]


def events(*found):
    return [Event(MEMBERS[rank], kind, text, detail) for rank, kind, text, detail in found]


def test_ranks_are_named_by_their_hosts():
    assert names([MEMBERS[3], MEMBERS[0], MEMBERS[2]]) == "rank 0 on host a, ranks 2, 3 on host b"


def test_an_error_that_all_ranks_have_names_none():
    verdict = judge(events(*[(rank, Kind.ERROR, "beta: no.", "") for rank in range(4)]), 4)
    assert verdict.lines == ("dpofast: error: beta: no.",)
    assert all(verdict.blames(rank) for rank in range(4))


def test_different_errors_have_a_line_each():
    found = events((1, Kind.ERROR, "one.", ""), (2, Kind.ERROR, "two.", ""))
    assert judge(found, 4).lines == (
        "dpofast: error: rank 1 on host a: one.",
        "dpofast: error: rank 2 on host b: two.",
    )


@pytest.mark.parametrize(
    ("follows", "kind"),
    [
        *[(Kind.BUG, kind) for kind in (Kind.ERROR, Kind.GONE, Kind.SILENT)],
        *[(Kind.BROKEN, kind) for kind in (Kind.ERROR, Kind.GONE, Kind.SILENT, Kind.BUG)],
    ],
)
def test_exceptions_that_follow_from_a_cause_are_not_reported(follows, kind):
    found = events(
        (0, follows, "RuntimeError: Connection closed by peer", "Traceback"), (3, kind, "x", "")
    )
    verdict = judge(found, 4)
    assert len(verdict.lines) == 1
    assert "rank 3 on host b" in verdict.lines[0]
    assert [verdict.blames(rank) for rank in range(4)] == [False, False, False, True]
    assert verdict.details == {"b": ""}


def test_a_broken_connection_is_reported_if_nothing_else_is_known():
    verdict = judge(events((1, Kind.BROKEN, "ranks 2 have not finished.", "")), 4)
    assert verdict.lines == ("dpofast: error: rank 1 on host a: ranks 2 have not finished.",)
    assert verdict.blames(1)


def test_a_traceback_is_printed_only_on_its_node():
    verdict = judge(events((2, Kind.BUG, "KeyError: 'x'", "Traceback ...\n")), 4)
    line = "dpofast: error: rank 2 on host b: KeyError: 'x'"
    assert verdict.text("b") == "Traceback ...\n" + line
    assert verdict.text("a") == line


def test_ranks_that_are_lost_together_share_a_line():
    (line,) = judge(events((2, Kind.SILENT, "20 s", ""), (3, Kind.SILENT, "20 s", "")), 4).lines
    assert "ranks 2, 3 on host b were lost: no answer for 20 s." in line
