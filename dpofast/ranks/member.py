"""Who a rank is: its number, its host and its node."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# How launchers number the nodes: torchrun and accelerate, DeepSpeed, SLURM.
NODE_VARIABLES = ("GROUP_RANK", "CROSS_RANK", "SLURM_NODEID")


@dataclass(frozen=True)
class Member:
    """A rank of the run.

    Attributes:
        rank: number of the rank.
        host: name of its host, for messages.
        node: tells the nodes apart, also where containers have the same host name.
    """

    rank: int
    host: str
    node: str

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Member:
        """This process, as the launcher has described it."""
        host = socket.gethostname()
        number = next((environment[n] for n in NODE_VARIABLES if environment.get(n)), "")
        return cls(int(environment["RANK"]), host, f"{host}/{number}")


def own_node(environment: Mapping[str, str] = os.environ) -> str:
    """What tells this process's node from others; empty if it can't meet any other rank."""
    return Member.of_environment(environment).node if num_ranks(environment) > 1 else ""


def num_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Ranks of the run, as the launcher says; 1 if this process can't meet any others."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(environment.get(name) for name in needed):
        return 1
    return int(environment["WORLD_SIZE"])


def names(members: Iterable[Member]) -> str:
    """The ranks in words, as "ranks 2, 3 on host b, rank 5 on host c"."""
    by_host: dict[str, list[str]] = {}
    for member in sorted(members, key=lambda member: member.rank):
        by_host.setdefault(member.host, []).append(str(member.rank))
    return ", ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)} on host {host}"
        for host, ranks in by_host.items()
    )
