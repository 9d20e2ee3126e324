from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from dpofast.errors import CheckpointError, ConfigError
from dpofast.ranks.member import Member
from dpofast.ranks.shared import check_on_all_nodes, check_shared

HOSTS = ("a", "a", "b", "b")
REMEDY = ", or else"


class Ranks:
    """Calls a function on all ranks, which are threads."""

    def __init__(self, hosts):
        self.members = [Member(rank, host, host) for rank, host in enumerate(hosts)]
        self.items = [None] * len(hosts)
        self.barrier = threading.Barrier(len(hosts))

    def exchange(self, rank, item):
        self.items[rank] = item
        self.barrier.wait(10)
        items = list(self.items)
        self.barrier.wait(10)
        return items

    def call(self, function):
        """What `function(member, exchange)` raises on each rank."""

        def on(member):
            try:
                function(member, partial(self.exchange, member.rank))
            except (ConfigError, CheckpointError) as error:
                return error
            return None

        with ThreadPoolExecutor(len(self.members)) as pool:
            return list(pool.map(on, self.members))


def test_a_shared_folder_passes_and_is_left_as_it_was(tmp_path):
    folders = {"output_dir": (tmp_path / "new" / "run", REMEDY), "store": (tmp_path, REMEDY)}
    raised = Ranks(HOSTS).call(
        lambda member, exchange: check_shared(folders, exchange, member, seconds=1.0)
    )
    assert raised == [None] * 4
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_is_not_shared_is_named_with_the_hosts_on_all_ranks(tmp_path):
    def check(member, exchange):
        own = tmp_path / member.host
        own.mkdir(exist_ok=True)
        folders = {"output_dir": (own, REMEDY), "store": (tmp_path, REMEDY)}
        check_shared(folders, exchange, member, seconds=0.3)

    raised = Ranks(HOSTS).call(check)
    for error, host in zip(raised, HOSTS, strict=True):
        assert str(error) == (
            f"output_dir: {tmp_path / host} isn't one folder on all nodes: rank 2 on host b can't "
            "see what rank 0 on host a writes there. Name a folder on a disk that all nodes share, "
            "or else."
        )


def test_a_disk_may_show_the_file_late(tmp_path):
    late = tmp_path / "late"
    late.mkdir()
    stop = threading.Event()

    def copy():
        """What a network file system does, half a second later."""
        while not stop.is_set():
            for path in tmp_path.glob("a/.dpofast*"):
                time.sleep(0.5)
                (late / path.name).touch()
            time.sleep(0.01)

    def check(member, exchange):
        folder = tmp_path / "a" if member.host == "a" else late
        check_shared({"store": (folder, REMEDY)}, exchange, member, seconds=5.0)

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        assert Ranks(("a", "b")).call(check) == [None, None]
    finally:
        stop.set()
        thread.join()


def test_one_node_is_not_checked(tmp_path):
    def check(member, exchange):
        own = tmp_path / str(member.rank)
        check_shared({"store": (own, REMEDY)}, exchange, member, seconds=0.1)

    assert Ranks(("a", "a")).call(check) == [None, None]
    check_shared({"store": (tmp_path, REMEDY)}, lambda item: pytest.fail("one rank"))


@pytest.mark.parametrize("other", ["missing", "another step", "the same"])
def test_a_checkpoint_must_be_on_all_nodes(tmp_path, other):
    states = {"a": "step 2", "b": {"another step": "step 4", "the same": "step 2"}.get(other)}
    for host, state in states.items():
        if state:
            (tmp_path / host).mkdir()
            (tmp_path / host / "trainer_state.json").write_text(state)

    raised = Ranks(HOSTS).call(
        lambda member, exchange: check_on_all_nodes(tmp_path / member.host, exchange, member)
    )
    if other == "the same":
        assert raised == [None] * 4
    else:
        assert all("rank 2 on host b has no such checkpoint" in str(error) for error in raised)
