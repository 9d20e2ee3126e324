"""How the ranks find rank 0: it leaves its address in the store that joins the process group."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpofast.ranks.hub import Hub
from dpofast.ranks.wire import Wire

KEY = "dpofast/ranks"
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Invitation:
    """Where rank 0 listens, and what it wants to hear.

    Attributes:
        addresses: names and numbers under which other machines may know rank 0's.
        port: the port.
        token: a secret of this run.
    """

    addresses: list[str]
    port: int
    token: str


def open_store() -> Any:
    """The store at MASTER_ADDR and MASTER_PORT; on rank 0, returns when all ranks have come.

    torch.distributed makes its process group by the same store, before or afterwards.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    return store


def invite(store: Any, hub: Hub) -> None:
    """Leave rank 0's address in the store."""
    master = os.environ["MASTER_ADDR"]
    # Rank 0 isn't always on the machine that MASTER_ADDR names, but that machine can reach it.
    addresses = [master, *_own_addresses(master), socket.gethostname()]
    unique = list(dict.fromkeys(addresses))
    store.set(KEY, json.dumps({"addresses": unique, "port": hub.port, "token": hub.token}))


def meet(open_store: Callable[[], Any], timeout: float) -> tuple[Wire, str]:
    """Connect to rank 0 as soon as it has left its address.

    Args:
        open_store: opens the store.
        timeout: seconds of silence after which rank 0 counts as lost.

    Returns:
        The connection, and the token.

    Raises:
        OSError: rank 0 can't be reached at any of its addresses.
        RuntimeError: the store can't be reached, or has no address.
    """
    invitation = Invitation(**json.loads(open_store().get(KEY)))
    reasons = []
    for address in invitation.addresses:
        where = (address, invitation.port)
        try:
            return Wire(socket.create_connection(where, CONNECT_SECONDS), timeout), invitation.token
        except OSError as error:
            reasons.append(f"{address} port {invitation.port}: {error}")
    raise OSError("; ".join(reasons))


def _own_addresses(master: str) -> list[str]:
    """The address of this machine on its way to another; nothing is sent."""
    with contextlib.suppress(OSError):
        family, kind, _, _, where = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            return [str(probe.getsockname()[0])]
    return []
