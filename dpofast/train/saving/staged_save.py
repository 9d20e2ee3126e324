"""One save of a checkpoint by all ranks, which is whole at its end or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from dpofast.errors import CheckpointError, DPOFastError, RankError, one_line
from dpofast.train.checkpoint.manifest import FileRecord, Manifest, hash_files
from dpofast.train.checkpoint.reports import RankReports
from dpofast.train.checkpoint.resume import step_folders, why_not_whole
from dpofast.train.checkpoint.space import failed_write, release_files, room
from dpofast.train.checkpoint.staging import (
    list_files,
    make_area,
    missing_of_ranks,
    publish,
    saving_area,
    staged_folder,
)


@dataclass(frozen=True)
class RankFiles:
    """Which files each rank must have written.

    Attributes:
        are_expected: whether the ranks write files of their own; not if only the model is saved.
        is_sharded: whether each rank writes its part of the optimizer, as under ZeRO.
    """

    are_expected: bool
    is_sharded: bool


class StagedSave:
    """A save: `begin`, write into `area` as if it were `run_dir`, then `finish`; on all ranks.

    Args:
        run_dir: folder that gets the `checkpoint-N`.
        step: N.
        is_leader: whether this rank renames; one rank does, or one on each node if each node has a
            folder of its own.
        reports: what the ranks tell each other.
        node: what tells this rank's node from others; used if several ranks rename.
        needed: bytes that the save takes, for messages; None if that isn't known.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        is_leader: bool,
        reports: RankReports,
        node: str = "",
        needed: int | None = None,
    ) -> None:
        self.run_dir, self.step, self.is_leader = run_dir, step, is_leader
        self.node, self.needed = node, needed
        self.area = saving_area(run_dir, step)
        self.folder = staged_folder(run_dir, step)
        self.final = run_dir / self.folder.name
        self._reports = reports
        self._run_id = ""
        self._is_sealed = False
        self._group = [reports.rank]  # the ranks that write into this folder
        self._leader = reports.rank  # the one of them that renames

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tell the other ranks of an error in the `with` block, and name the checkpoint in it.

        Raises:
            CheckpointError: this rank couldn't write.
            RankError: another rank couldn't.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, RankError):
                self._clean()
                raise
            told: BaseException = error
            if isinstance(error, (OSError, RuntimeError, SafetensorError)):
                reason = failed_write(error, self.run_dir) or one_line(error)
                release_files(error)
                told = CheckpointError(
                    f"The checkpoint of step {self.step} can't be written into "
                    f"{str(self.run_dir)!r}: {reason}"
                )
            is_plain = isinstance(told, DPOFastError)
            # First, as the others go on writing until they hear of it.
            self._reports.fail(one_line(told) if is_plain else f"{type(told).__name__}: {told}")
            self._clean()
            if told is error:
                raise
            free = room(self.run_dir, self.needed)  # after the unfinished files are gone
            raise CheckpointError(f"{told} ({free}); {self._last_whole()}.") from error

    def _last_whole(self) -> str:
        """Where the run goes on once the disk can be written, as the end of a sentence."""
        for path in step_folders(self.run_dir):
            if why_not_whole(path, self._run_id, hashes=False) is None:
                return (
                    f"the last whole checkpoint is {path.name}: make room, and go on from it with "
                    "resume_from_checkpoint: true"
                )
        return "no older checkpoint of the run is there: make room, and start it again"

    def _clean(self) -> None:
        self._reports.stop()
        if self._is_sealed or not self.is_leader:
            return
        # Without its folder, a rank that still writes would fail for another reason.
        if self._reports.all_have_stopped():
            shutil.rmtree(self.area, ignore_errors=True)

    def begin(self, run_id: str) -> str:
        """Make the folder to write into.

        Args:
            run_id: the run's id; rank 0's is taken.

        Returns:
            The run's id on all ranks.
        """
        if self.is_leader:
            make_area(self.run_dir, self.step)
        told = self._reports.share([self.is_leader, run_id, self.node])
        leaders = [rank for rank, (is_leader, *_) in enumerate(told) if is_leader]
        is_shared = len(leaders) == 1
        self._group = [r for r, (*_, node) in enumerate(told) if is_shared or node == self.node]
        (self._leader,) = set(leaders).intersection(self._group)
        self._run_id = told[0][1]
        return self._run_id

    def finish(self, expected: RankFiles) -> Path:
        """Check and hash what the ranks have written, and give the checkpoint its name.

        Args:
            expected: which files the ranks must have written.

        Returns:
            The folder `checkpoint-N`.
        """
        self._reports.share(None)  # all have written
        sizes = self._agree_on_files(expected)
        records = self._hash_share(sizes)
        if self.is_leader:
            world_size = self._reports.world_size
            Manifest(self._run_id, self.step, world_size, records).write(self.folder)
            self._is_sealed = True
        self._reports.share(None)  # every node has its manifest
        if self.is_leader:
            publish(self.run_dir, self.step)
        self._reports.share(None)
        return self.final

    def _agree_on_files(self, expected: RankFiles) -> dict[str, int]:
        """Path and bytes of each file in this rank's folder, as its leader sees them."""
        sizes = None
        if self.is_leader:
            sizes = list_files(self.folder)
            missing = []
            if expected.are_expected:
                missing = missing_of_ranks(
                    sizes,
                    self._group,
                    self._reports.world_size,
                    is_sharded=expected.is_sharded,
                )
            if missing:
                raise CheckpointError(
                    f"The checkpoint of step {self.step} is missing {', '.join(missing)} in "
                    f"{str(self.run_dir)!r}, though all ranks have written their files: if the "
                    "nodes don't share that folder, set save_on_each_node: true."
                )
        found: dict[str, int] = self._reports.share(sizes)[self._leader]
        return found

    def _hash_share(self, sizes: dict[str, int]) -> dict[str, FileRecord]:
        """The records of all files in this rank's folder, of which each rank hashes a share."""
        shares: dict[int, list[str]] = {rank: [] for rank in self._group}
        loads = dict.fromkeys(self._group, 0)
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            rank = min(loads, key=loads.__getitem__)
            shares[rank].append(name)
            loads[rank] += sizes[name]
        own = {}
        hashed = hash_files(self.folder, shares[self._reports.rank], to_disk=True)
        for name, record in hashed.items():
            if isinstance(record, OSError):
                raise record
            if record.size != sizes[name]:
                raise CheckpointError(
                    f"{os.path.join(self.folder, name)} has changed while it was saved; let no "
                    "other process write there."
                )
            own[name] = (record.size, record.xxh3_128)
        told = self._reports.share(own)
        return {
            name: FileRecord(*record) for rank in self._group for name, record in told[rank].items()
        }
