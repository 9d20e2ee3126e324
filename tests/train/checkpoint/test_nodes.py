"""With a folder on each node, a run resumes from what all nodes have."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dpofast.errors import CheckpointError
from dpofast.train.checkpoint.nodes import check_on_each_node, whole_on_all_nodes
from dpofast.train.checkpoint.resume import newest_whole
from tests.train.checkpoint.folders import DAMAGE, RUN, make_checkpoint

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
        common = whole_on_all_nodes(folder, True, is_leader, exchange)
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
