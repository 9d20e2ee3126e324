"""Why a run ends: what happened on its ranks, and what the user is told about it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from dpofast.ranks.member import Member, names


class Kind(enum.StrEnum):
    """What can happen to a rank."""

    ERROR = "error"  # one of dpofast's errors, which says what to do
    BUG = "bug"  # any other exception
    BROKEN = "broken"  # an error that says that the connection to another rank has broken
    GONE = "gone"  # its process has ended without a word
    SILENT = "silent"  # its machine or the network is down


@dataclass(frozen=True)
class Event:
    """Something that happened to a rank and ends the run.

    Attributes:
        member: the rank.
        kind: what happened.
        text: the error's message, or for SILENT the seconds in words.
        detail: the traceback of a BUG; empty if Python prints it.
    """

    member: Member
    kind: Kind
    text: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """Why the run ends.

    Attributes:
        causes: the events that ended it. The others are their consequences: if a rank is lost, the
            communication of the others breaks with all sorts of exceptions.
        lines: what each node prints.
        details: tracebacks, by the node on which they are printed.
    """

    causes: tuple[Event, ...]
    lines: tuple[str, ...]
    details: dict[str, str]

    def text(self, node: str) -> str:
        """What a node prints."""
        return self.details.get(node, "") + "\n".join(self.lines)

    def blames(self, rank: int) -> bool:
        """Whether the run ends because of this rank."""
        return any(event.member.rank == rank for event in self.causes)


def judge(events: Sequence[Event], num_ranks: int) -> Verdict:
    """Say why the run ends.

    Args:
        events: all that happened within a second or so, at least one event.
        num_ranks: number of ranks of the run.
    """
    by_weight = ((Kind.ERROR, Kind.GONE, Kind.SILENT), (Kind.BUG,), (Kind.BROKEN,))
    found = ([event for event in events if event.kind in kinds] for kinds in by_weight)
    causes = next(filter(None, found))
    groups: dict[tuple[Kind, str], list[Event]] = {}
    for event in causes:
        groups.setdefault((event.kind, event.text), []).append(event)
    lines: list[str] = []
    details: dict[str, str] = {}
    for (kind, text), group in groups.items():
        who = [event.member for event in group]
        lines.append("dpofast: error: " + _sentence(kind, text, who, len(who) == num_ranks))
        node = group[0].member.node
        details[node] = details.get(node, "") + group[0].detail
    return Verdict(tuple(causes), tuple(lines), details)


def _sentence(kind: Kind, text: str, who: Sequence[Member], is_everybody: bool) -> str:
    several = len(who) > 1
    match kind:
        case Kind.ERROR:
            return text if is_everybody else f"{names(who)}: {text}"
        case Kind.BUG | Kind.BROKEN:
            return f"{'all ranks' if is_everybody else names(who)}: {text}"
        case Kind.GONE:
            return (
                f"{names(who)} {'were' if several else 'was'} lost: "
                f"{'their processes have' if several else 'its process has'} ended. If nothing "
                "else says why, the system has killed "
                f"{'them' if several else 'it'}, for example because memory ran out."
            )
        case Kind.SILENT:
            return (
                f"{names(who)} {'were' if several else 'was'} lost: no answer for {text}. The "
                "machine is down, or the network is."
            )
