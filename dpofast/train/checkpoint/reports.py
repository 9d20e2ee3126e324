"""What the ranks tell each other while they save, so that the failure of one reaches all.

A rank whose write fails can't take part in the next collective operation: the others may be in an
earlier one, and would wait for it for ever. So reports go through the process group's key-value
store, where a rank that waits for reports sees a failure, too.
"""

from __future__ import annotations

import itertools
import json
import socket
import time
from typing import Any

from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from dpofast.errors import RankError


class RankReports:
    """The reports of one save. All ranks make one, for each save.

    Args:
        timeout: seconds after which a rank that hasn't reported is given up.
    """

    _saves = itertools.count()

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.rank, self.world_size, self._store = 0, 1, None
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
            store = _get_default_store()
            name = f"dpofast/save/{next(RankReports._saves)}"
            self._store = PrefixStore(name, store)
        self._round = 0

    def share(self, report: Any) -> list[Any]:
        """Tell all ranks something, and wait for what they tell.

        Args:
            report: turns into JSON.

        Returns:
            The reports of all ranks.

        Raises:
            RankError: a rank has failed, or hasn't reported in time.
        """
        if self._store is None:
            return [report]
        self._round += 1
        names = [f"{self._round}/{rank}" for rank in range(self.world_size)]
        self._store.set(names[self.rank], json.dumps(report))
        self._wait(names)
        # All ranks are in this round, so all have read the one before.
        if self._round > 1:
            self._store.delete_key(f"{self._round - 1}/{self.rank}")
        return [json.loads(self._store.get(name)) for name in names]

    def _wait(self, names: list[str]) -> None:
        assert self._store is not None
        started, pause = time.monotonic(), 0.001
        while not self._store.check(names):
            if self._store.check(["failed"]):
                raise RankError(self._store.get("failed").decode())
            if time.monotonic() - started > self.timeout:
                late = [rank for rank, name in enumerate(names) if not self._store.check([name])]
                raise RankError(
                    f"ranks {', '.join(map(str, late))} have not finished their part of a "
                    f"checkpoint within {self.timeout:g} seconds; raise ddp_timeout if the disk is "
                    "that slow."
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def fail(self, reason: str) -> None:
        """Tell all ranks that wait for this one, now or later in the save, why it has failed."""
        if self._store is not None:
            self._store.set("failed", f"rank {self.rank} on {socket.gethostname()}: {reason}")
