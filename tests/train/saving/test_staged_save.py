"""All ranks save one checkpoint, which is whole or not there; ranks are threads here."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from dpofast.errors import CheckpointError, RankError
from dpofast.train.checkpoint.manifest import MANIFEST_FILE, Manifest
from dpofast.train.checkpoint.reports import RankReports
from dpofast.train.checkpoint.resume import newest_whole
from dpofast.train.checkpoint.staging import recover
from dpofast.train.saving.staged_save import RankFiles, StagedSave

PLAIN = RankFiles(are_expected=True, is_sharded=False)
RANKS = 4


class Dies(BaseException):
    """Ends a rank as a kill does: nothing is reported or tidied up."""


def write(folder: Path, rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rng_state_{rank}.pth").write_text(f"of rank {rank}")
    if rank % 2 == 0:
        (folder / f"model-{rank}.safetensors").write_bytes(bytes(5000 - rank))


def save_on_ranks(
    run_dirs: list[Path],
    work: Callable[[Path, int], None] = write,
    leaders: tuple[int, ...] = (0,),
    expected: RankFiles = PLAIN,
    timeout: float = 20.0,
) -> list[object]:
    """What the save of step 6 returned or raised on each rank."""
    store = HashStore()

    def save(rank: int) -> object:
        reports = RankReports(rank, len(run_dirs), store, timeout)
        saving = StagedSave(run_dirs[rank], 6, rank in leaders, reports, str(run_dirs[rank]))
        try:
            run_dirs[rank].mkdir(exist_ok=True)
            with saving.failing_together():
                run_id = saving.begin(f"run-{rank}")
                assert run_id == "run-0"
                try:
                    work(saving.area / "checkpoint-6", rank)
                except Dies:
                    return None
                return saving.finish(expected)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(run_dirs)) as pool:
        return list(pool.map(save, range(len(run_dirs))))


def test_all_ranks_save_one_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-6"
    assert save_on_ranks([tmp_path] * RANKS) == [folder] * RANKS
    manifest = Manifest.read(folder)
    assert (manifest.run_id, manifest.step, manifest.ranks) == ("run-0", 6, RANKS)
    assert len(manifest.files) == 6
    assert newest_whole(tmp_path, "run-0") == (folder, [])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def test_each_file_is_hashed_and_on_the_disk_once(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noting(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noting)
    save_on_ranks([tmp_path] * RANKS)
    names = [*Manifest.read(tmp_path / "checkpoint-6").files, MANIFEST_FILE]
    assert sorted(name for name in synced if name in names) == sorted(names)
    assert max(synced.index(name) for name in names) == synced.index(MANIFEST_FILE)


@pytest.mark.parametrize("leaders", [(0,), (0, 2)])
def test_a_rank_that_dies_before_its_file_leaves_nothing_whole(tmp_path, leaders):
    run_dirs = [tmp_path / str(leader) for leader in leaders for _ in range(RANKS // len(leaders))]

    def work(folder: Path, rank: int) -> None:
        if rank == 1:
            raise Dies
        write(folder, rank)

    results = save_on_ranks(run_dirs, work, leaders, timeout=0.3)
    assert all(isinstance(results[rank], RankError) for rank in (0, 2, 3))
    for run_dir in set(run_dirs):
        assert newest_whole(run_dir, None) == (None, [])
        recover(run_dir)
        assert list(run_dir.iterdir()) == []


@pytest.mark.parametrize("failing", [0, 1])
def test_the_failure_of_a_rank_reaches_all(tmp_path, failing):
    def work(folder: Path, rank: int) -> None:
        write(folder, rank)
        if rank == failing:
            raise OSError(28, "No space left on device", str(folder / "optimizer.pt"))

    results = save_on_ranks([tmp_path] * RANKS, work)
    for rank, error in enumerate(results):
        assert type(error) is (CheckpointError if rank == failing else RankError)
        assert "No space left on device" in str(error)
        assert str(error).startswith(f"rank {failing} on {socket.gethostname()}: ") == (
            rank != failing
        )
    assert list(tmp_path.iterdir()) == []


def test_a_bug_is_told_and_raised_as_it_is(tmp_path):
    def work(folder: Path, rank: int) -> None:
        if rank == 2:
            raise TypeError("no such argument")

    results = save_on_ranks([tmp_path] * RANKS, work)
    assert type(results[2]) is TypeError
    assert "TypeError: no such argument" in str(results[0])


def test_a_rank_whose_file_went_elsewhere_is_noticed(tmp_path):
    run_dirs = [tmp_path / "shared", tmp_path / "shared", tmp_path / "own"]
    first, *_ = save_on_ranks(run_dirs)
    assert "missing rng_state_2.pth" in str(first)
    assert "save_on_each_node: true" in str(first)
    assert list((tmp_path / "shared").iterdir()) == []


def test_missing_shards_are_noticed(tmp_path):
    first, *_ = save_on_ranks([tmp_path] * 2, expected=RankFiles(True, is_sharded=True))
    assert "missing zero_pp_rank_0_mp_rank_*_optim_states.pt, zero_pp_rank_1" in str(first)
    assert (
        save_on_ranks([tmp_path] * 2, lambda *_: None, expected=RankFiles(False, False))
        == [tmp_path / "checkpoint-6"] * 2
    )


@pytest.mark.parametrize("second", [[2, 3, 4], [1, 3]], ids=["in blocks", "in turn"])
def test_each_node_gets_a_checkpoint_of_its_own(tmp_path, second):
    first = [rank for rank in range(5) if rank not in second]
    run_dirs = [tmp_path / ("second" if rank in second else "first") for rank in range(5)]
    saved = save_on_ranks(run_dirs, leaders=(0, second[0]))
    assert saved == [path / "checkpoint-6" for path in run_dirs]
    for name, ranks in (("first", first), ("second", second)):
        folder = tmp_path / name / "checkpoint-6"
        files = Manifest.read(folder).files
        assert [file for file in files if "rng" in file] == [f"rng_state_{r}.pth" for r in ranks]
        assert newest_whole(tmp_path / name, "run-0") == (folder, [])


def test_a_failed_rename_leaves_what_is_written_for_the_next_start(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        results = save_on_ranks([tmp_path] * 2)
    assert ["Permission denied" in str(error) for error in results] == [True, True]
    assert newest_whole(tmp_path, None) == (None, [])
    recover(tmp_path)
    assert newest_whole(tmp_path, None) == (tmp_path / "checkpoint-6", [])


def test_no_node_names_its_checkpoint_before_all_have_their_manifests(tmp_path):
    run_dirs = [tmp_path / "first", tmp_path / "second"]

    def work(folder: Path, rank: int) -> None:
        write(folder, rank)
        if rank == 1:
            (folder / MANIFEST_FILE).mkdir()  # its manifest can't be written

    results = save_on_ranks(run_dirs, work, leaders=(0, 1))
    assert [type(error) for error in results] == [RankError, CheckpointError]
    assert not [path for run_dir in run_dirs for path in run_dir.glob("checkpoint-*")]
