"""With a folder on each node, a run resumes from what all nodes have."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dpofast.errors import CheckpointError
from dpofast.train.checkpoint import manifest as manifest_module
from dpofast.train.checkpoint.manifest import Manifest, hash_files
from dpofast.train.checkpoint.nodes import (
    check_files_of_ranks,
    check_on_each_node,
    whole_on_all_nodes,
)
from dpofast.train.checkpoint.resume import newest_whole
from tests.train.checkpoint.folders import DAMAGE, RUN, flip_a_bit, make_checkpoint

LEADERS = (True, False, True)  # the third rank is on a node of its own


def on_ranks(work, folders):
    """What `work` returns or raises on each rank, given its folder and place and an exchange."""
    barrier, items = threading.Barrier(3), [None] * 3

    def run(rank):
        def exchange(item):
            items[rank] = item
            barrier.wait()
            found = list(items)
            barrier.wait()
            return found

        try:
            return work(folders[rank], LEADERS[rank], exchange)
        except CheckpointError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(run, range(3)))


@pytest.fixture
def folders(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        for step in (2, 4, 6):
            make_checkpoint(folder, step)
    return [first, first, second]


def chosen_on_ranks(folders):
    def choose(folder, is_leader, exchange):
        common = whole_on_all_nodes(folder, RUN, True, is_leader, exchange)
        return newest_whole(folder, RUN, on_all_nodes=common)

    return on_ranks(choose, folders)


def test_what_all_nodes_have_is_taken(folders):
    first, _, second = folders
    assert [chosen.name for chosen, _ in chosen_on_ranks(folders)] == ["checkpoint-6"] * 3
    DAMAGE["truncated"](second / "checkpoint-6" / "optimizer.pt")
    DAMAGE["deleted"](first / "checkpoint-4" / "optimizer.pt")
    results = chosen_on_ranks(folders)
    assert [chosen.name for chosen, _ in results] == ["checkpoint-2"] * 3
    assert [reason for _, reason in results[0][1]] == [
        "another node has no such checkpoint that is whole",
        "optimizer.pt is missing",
    ]


def test_a_flipped_bit_on_another_node_is_noticed_and_older_ones_are_not_read(folders, monkeypatch):
    read = []
    hash_files = manifest_module.hash_files

    def noting(folder, *args, **options):
        read.append(folder.name)
        return hash_files(folder, *args, **options)

    monkeypatch.setattr(manifest_module, "hash_files", noting)
    flip_a_bit(folders[2] / "checkpoint-6" / "optimizer.pt", random.Random(0))
    results = chosen_on_ranks(folders)
    assert [chosen.name for chosen, _ in results] == ["checkpoint-4"] * 3
    ((_, reason),) = results[0][1]
    assert reason.endswith(", on the node of rank 2")
    assert reason.startswith("optimizer.pt ")
    assert sorted(read) == ["checkpoint-4"] * 2 + ["checkpoint-6"] * 2  # once on each node


def test_without_a_run_there_is_none(folders):
    def look(folder, is_leader, exchange):
        return whole_on_all_nodes(folder, None, True, is_leader, exchange)

    assert on_ranks(look, folders) == [{}] * 3


@pytest.mark.parametrize(("world_size", "is_sharded"), [(2, False), (2, True), (1, False)])
def test_files_of_other_ranks_are_missing(tmp_path, world_size, is_sharded):
    """The folder of a node that had rank 0 of two."""
    names = ["rng_state_0.pth", "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    folder = tmp_path / "checkpoint-2"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"content")
    Manifest(RUN, 2, 2, hash_files(folder, names)).write(folder)
    check_files_of_ranks(folder, [0], world_size, is_sharded)
    if world_size == 1:  # the number of ranks has changed, which others look at
        return
    for ranks in ([1], [0, 1]):
        with pytest.raises(CheckpointError, match=r"has no rng_state_1\.pth, as another machine"):
            check_files_of_ranks(folder, ranks, world_size, is_sharded)
    (folder / "rng_state_1.pth").write_bytes(b"copied")
    if is_sharded:
        with pytest.raises(CheckpointError, match=r"has no zero_pp_rank_1_mp_rank_\*_optim_"):
            check_files_of_ranks(folder, [0, 1], world_size, is_sharded)
    else:
        check_files_of_ranks(folder, [0, 1], world_size, is_sharded)


def test_a_step_of_another_run_is_another_checkpoint(folders):
    make_checkpoint(folders[2], 6, run_id="run-b")
    assert chosen_on_ranks(folders)[0][0].name == "checkpoint-4"


def test_the_node_with_the_damaged_part_is_named(folders):
    def check(folder, is_leader, exchange):
        return check_on_each_node(str(folder / "checkpoint-4"), is_leader, exchange)

    assert on_ranks(check, folders) == [None] * 3
    DAMAGE["truncated"](folders[2] / "checkpoint-4" / "optimizer.pt")
    for told in on_ranks(check, folders):
        assert "not whole on the node of rank 2: optimizer.pt is truncated" in told
