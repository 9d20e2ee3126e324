from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from dpofast.errors import CheckpointError, ConfigError
from dpofast.ranks.member import Member
from dpofast.ranks.shared import check_on_all_nodes, check_separate, check_shared

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


@pytest.mark.parametrize("seeing", [("a", "b"), ("a", "c"), ()])
def test_nodes_must_not_share_what_each_must_have_for_itself(tmp_path, seeing):
    hosts = ("a", "a", "b", "b", "c")

    def check(member, exchange):
        own = "shared" if member.host in seeing else member.host
        check_separate(tmp_path / own, exchange, member)

    raised = Ranks(hosts).call(check)
    if not seeing:
        assert raised == [None] * 5
    else:
        other = hosts.index(seeing[1])
        for error in raised:
            assert str(error).startswith("save_on_each_node: output_dir ")
            assert (
                f"is one folder on rank 0 on host a, rank {other} on host {seeing[1]}, whose "
                "checkpoints would overwrite each other there."
            ) in str(error)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def state(step, **more):
    """A trainer's state, as two nodes of a run write it at the same step."""
    logs = [{"loss": 0.5, "pairs_per_second": more.get("speed", 1.0), "step": step}]
    return json.dumps({"global_step": step, "log_history": logs, **more})


STATES = {
    "missing": None,
    "another step": state(4),
    "another run": state(2).replace("0.5", "0.25"),
    "damaged": state(2)[:-5],
    "the same": state(2, is_world_process_zero=False, speed=2.0),
}


@pytest.mark.parametrize("other", STATES)
def test_a_checkpoint_must_be_on_all_nodes(tmp_path, other):
    for host, text in {"a": state(2, is_world_process_zero=True), "b": STATES[other]}.items():
        if text is not None:
            (tmp_path / host).mkdir()
            (tmp_path / host / "trainer_state.json").write_text(text)

    raised = Ranks(HOSTS).call(
        lambda member, exchange: check_on_all_nodes(tmp_path / member.host, exchange, member)
    )
    if other == "the same":
        assert raised == [None] * 4
    else:
        assert all("rank 2 on host b has no such checkpoint" in str(error) for error in raised)
