"""Two network namespaces of this machine as two nodes, joined by a virtual cable.

Each node has a host name of its own and, if asked for, a disk of its own. They have the same files
otherwise. It takes root.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT

INTERFACE = "cable0"
COUNT = itertools.count()
STAND_INS = Path(__file__).with_name("stand_ins")


@dataclass(frozen=True)
class Node:
    """A network namespace.

    Attributes:
        name: its host name, and what the stand-in of `ssh` calls it.
        namespace: the name of the namespace.
        address: its address on the cable.
    """

    name: str
    namespace: str
    address: str

    def enter(self, words: Sequence[str], own_folder: Path | None = None) -> list[str]:
        """A command that runs `words` on this node, with a disk of its own at `own_folder`."""
        steps = [f"hostname {self.name}"]
        if own_folder is not None:
            steps.append(f"mount -t tmpfs none {shlex.quote(str(own_folder))}")
        steps.append(f"exec {shlex.join(words)}")
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount"]
        return [*enter, "sh", "-ec", "; ".join(steps)]


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes; skips the test where namespaces can't be made."""
    tag = f"dpo{os.getpid()}{next(COUNT)}"  # names of interfaces have at most 15 letters
    nodes = Node("node-a", f"{tag}a", "10.83.0.1"), Node("node-b", f"{tag}b", "10.83.0.2")
    try:
        for node in nodes:
            ip("netns", "add", node.namespace)
        ip("link", "add", f"{tag}a", "type", "veth", "peer", "name", f"{tag}b")
        for node in nodes:
            ip("link", "set", node.namespace, "netns", node.namespace, "name", INTERFACE)
            ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                ip("-n", node.namespace, "link", "set", device, "up")
        run = subprocess.run(nodes[0].enter(["true"]), capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr)
    except (OSError, RuntimeError) as error:
        remove(nodes)
        pytest.skip(f"no network namespaces here: {error}")
    try:
        yield nodes
    finally:
        remove(nodes)


def remove(nodes: Sequence[Node]) -> None:
    """End what still runs on the nodes, and remove them."""
    for node in nodes:
        kill_all(node)
        subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True)


def kill_all(node: Node) -> None:
    """Kill all processes on a node, as a power cut does."""
    found = subprocess.run(
        ["ip", "netns", "pids", node.namespace], capture_output=True, text=True, check=False
    )
    for process in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), 9)


def cut_cable(nodes: Sequence[Node]) -> None:
    """Let all that the nodes send to each other get lost, without a word to either of them.

    Their interfaces stay up: each sends to a hardware address that nobody has.
    """
    for node, other in (nodes, nodes[::-1]):
        where = ("to", other.address, "lladdr", "02:00:00:00:00:99", "nud", "permanent")
        ip("-n", node.namespace, "neigh", "replace", *where, "dev", INTERFACE)


def ip(*words: str) -> None:
    """Run `ip`.

    Raises:
        RuntimeError: it failed.
        OSError: there is no such command.
    """
    run = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {run.stderr.strip()}")


def environment(**more: str) -> dict[str, str]:
    """The environment of a run on the nodes."""
    paths = [str(ROOT), str(ROOT / "kernels")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join([str(STAND_INS), os.environ["PATH"]]),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        **more,
    }


def torchrun(nodes: Sequence[Node], rank: int, ranks: int = 1) -> list[str]:
    """The start of a command of the node with this number, with so many ranks on each node."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(nodes)),
        "--node-rank", str(rank), "--nproc-per-node", str(ranks),
        "--master-addr", nodes[0].address, "--master-port", "29511",
    ]  # fmt: skip
