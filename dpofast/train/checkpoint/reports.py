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
from contextlib import suppress
from typing import Any

from torch import distributed
from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from dpofast.errors import RankError, one_line

STOP_SECONDS = 5.0
_SAVES = itertools.count()


class RankReports:
    """The reports of one save. All ranks make one, for each save.

    Args:
        rank: number of this rank.
        world_size: number of ranks.
        store: key-value store that all ranks reach, with no keys of another save; None for one
            rank.
        timeout: seconds after which a rank that hasn't reported is given up.
    """

    def __init__(self, rank: int, world_size: int, store: Store | None, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._store = store
        self._round = 0

    @classmethod
    def of_process_group(cls, timeout: float) -> RankReports:
        """The reports of the next save in this process, and in the others of its group."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls(0, 1, None, timeout)
        store = PrefixStore(f"dpofast/save/{next(_SAVES)}", _get_default_store())
        return cls(distributed.get_rank(), distributed.get_world_size(), store, timeout)

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
        try:
            return self._share(self._store, report)
        except DistError as error:
            raise RankError(
                f"rank 0, which keeps what the ranks tell each other, can't be reached any more "
                f"({one_line(error)})."
            ) from error

    def _share(self, store: Store, report: Any) -> list[Any]:
        self._round += 1
        names = [f"{self._round}/{rank}" for rank in range(self.world_size)]
        store.set(names[self.rank], json.dumps(report))
        self._wait(store, names)
        # All ranks are in this round, so all have read the one before.
        if self._round > 1:
            store.delete_key(f"{self._round - 1}/{self.rank}")
        return [json.loads(store.get(name)) for name in names]

    def _wait(self, store: Store, names: list[str]) -> None:
        started, pause = time.monotonic(), 0.001
        while not store.check(names):
            if store.check(["failed"]):
                raise RankError(store.get("failed").decode())
            if time.monotonic() - started > self.timeout:
                late = [rank for rank, name in enumerate(names) if not store.check([name])]
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
            told = f"rank {self.rank} on {socket.gethostname()}: {reason}"
            with suppress(DistError):  # the failure is raised here in any case
                self._store.compare_set("failed", "", told)  # the first failure is the cause

    def stop(self) -> None:
        """Tell that this rank writes no more, after a failure."""
        if self._store is not None:
            with suppress(DistError):
                self._store.set(f"stopped/{self.rank}", "")

    def all_have_stopped(self) -> bool:
        """Whether no rank writes any more, after a failure that all are told of.

        A rank that can't hear of it, because it waits for a failed one in a collective operation,
        is waited for briefly.
        """
        if self._store is None:
            return True
        names = [f"stopped/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + min(STOP_SECONDS, self.timeout)
        with suppress(DistError):
            while not self._store.check(names):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.01)
            return True
        return False
