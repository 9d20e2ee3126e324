"""Folders that all nodes of a run must share, looked at before the run needs them."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpofast.errors import CheckpointError, ConfigError
from dpofast.ranks.member import Member, names, num_ranks

Exchange = Callable[[Any], list[Any]]
# A network file system may show new files late. Names that were never asked for come at once.
SECONDS = 15.0
STATE_FILE = "trainer_state.json"


def check_shared(
    folders: Mapping[str, tuple[Path, str]],
    exchange: Exchange,
    member: Member | None = None,
    seconds: float = SECONDS,
) -> None:
    """Check that each folder is one and the same on all nodes.

    Rank 0 writes a file to it, for which the first rank of every other node looks. All ranks must
    call this at the same time.

    Args:
        folders: by the name of the option: a folder, and what else the user can do about it.
        exchange: takes an object of each rank and returns those of all ranks, in their order.
        member: this rank; by default, what the launcher says.
        seconds: how long the file is looked for.

    Raises:
        ConfigError: on all ranks; names the folder and the hosts that have another one.
    """
    member = member or _own()
    firsts = _first_of_each_node(exchange, member)
    if member is None or len(firsts) < 2:
        return
    paths = {option: folder for option, (folder, _) in folders.items()}
    for option, others in _who_is_blind(paths, exchange, member, firsts, seconds).items():
        folder, remedy = folders[option]
        if others:
            raise ConfigError(
                f"{option}: {folder} isn't one folder on all nodes: {names(others)} can't see what "
                f"{names(firsts[:1])} writes there. Name a folder on a disk that all nodes share"
                f"{remedy}."
            )


def check_separate(folder: Path, exchange: Exchange, member: Member | None = None) -> None:
    """Check that each node has an output folder of its own, as `save_on_each_node` needs.

    Args:
        folder: the output folder, under the same name on all nodes.
        exchange, member: as in `check_shared`.

    Raises:
        ConfigError: on all ranks; names the folder and hosts that share it.
    """
    member = member or _own()
    firsts = _first_of_each_node(exchange, member)
    if member is None or len(firsts) < 2:
        return
    own = folder / f".dpofast-own-{secrets.token_hex(8)}"
    has_written = member in firsts and _write(own)
    files = exchange(own.name if has_written else None)
    seen = []
    if member in firsts:
        with contextlib.suppress(OSError):
            there = {entry.name for entry in folder.iterdir()}
            seen = [first for first in firsts if first != member and files[first.rank] in there]
    seen_by = exchange(seen)
    if has_written:
        own.unlink(missing_ok=True)
    for first in firsts:
        if seen_by[first.rank]:
            raise ConfigError(
                f"save_on_each_node: output_dir {folder} is one folder on "
                f"{names([first, *seen_by[first.rank]])}, whose checkpoints would overwrite each "
                "other there. Leave save_on_each_node out if all nodes share the folder; "
                "otherwise name one that each has for itself."
            )


def check_on_all_nodes(
    checkpoint: str | Path, exchange: Exchange, member: Member | None = None
) -> None:
    """Check that all nodes see the checkpoint that the run resumes from.

    With `save_on_each_node`, each node has a folder of its own, with a part of the checkpoint. So
    the folders are compared by the state of the trainer, which is in all of them. Parts of it
    differ between the nodes of a run, such as its speed.

    Args:
        checkpoint: folder of the checkpoint.
        exchange, member: as in `check_shared`.

    Raises:
        CheckpointError: on all ranks; names the folder and the hosts that don't have it.
    """
    firsts = _first_of_each_node(exchange, member or _own())
    if len(firsts) < 2:
        return
    found = exchange(_progress(Path(checkpoint) / STATE_FILE))
    others = [first for first in firsts if found[first.rank] != found[0]]
    if others:
        raise CheckpointError(
            f"{checkpoint}: {names(others)} has no such checkpoint, or another one than "
            f"{names(firsts[:1])}. Resume from a folder on a disk that all nodes share, or copy "
            "the checkpoint to each node."
        )


def _own() -> Member | None:
    return Member.of_environment() if num_ranks() > 1 else None


def _first_of_each_node(exchange: Exchange, member: Member | None) -> list[Member]:
    """The lowest rank of each node, rank 0 first; none in a run of one rank."""
    if member is None:
        return []
    firsts: dict[str, Member] = {}
    for each in exchange(member):
        firsts.setdefault(each.node, each)
    return list(firsts.values())


def _who_is_blind(
    folders: Mapping[str, Path],
    exchange: Exchange,
    member: Member,
    firsts: list[Member],
    seconds: float,
) -> dict[str, list[Member]]:
    """The first ranks of nodes that can't see what rank 0 writes into each folder, by its option.

    Folders into which rank 0 can't write are left out.
    """
    own_name = f".dpofast-shared-{secrets.token_hex(8)}"
    written = []
    if member.rank == 0:
        written = [option for option, folder in folders.items() if _write(folder / own_name)]
    name, options = exchange((own_name, written))[0]
    missing = []
    if member in firsts:
        end = time.monotonic() + seconds
        missing = [each for each in options if not _appears(folders[each] / name, end)]
    of_all = exchange(missing)
    for option in written:
        (folders[option] / name).unlink(missing_ok=True)
    return {
        option: [first for first in firsts if option in of_all[first.rank]] for option in options
    }


def _write(path: Path) -> bool:
    """Make a file; False if that isn't possible, which other checks report."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        return False
    return True


def _appears(path: Path, end: float) -> bool:
    while True:
        # Opening the folder makes NFS ask the server again.
        with contextlib.suppress(OSError):
            if any(entry.name == path.name for entry in path.parent.iterdir()):
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.2)


def _progress(path: Path) -> Any:
    """The step and the losses that a trainer's state records; None if it can't be read."""
    try:
        state = json.loads(path.read_bytes())
        losses = [entry.get("loss") for entry in state["log_history"]]
        return [state["global_step"], losses]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
