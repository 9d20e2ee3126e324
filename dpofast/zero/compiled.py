"""The C++ operations that DeepSpeed compiles on first use, and the locks that it holds meanwhile.

Each start of a process that uses such an operation holds a file `lock` for a moment. A process that
is killed in that moment leaves the file, and all later starts wait for it without a word.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

# DeepSpeed's all-reduce in shared memory, which only its inference calls.
SHARED_MEMORY = "deepspeed_shm_comm"


def settle_operations() -> None:
    """Leave out an operation that training never calls, and name the locks that nobody holds.

    Call it before DeepSpeed joins the process group. With gloo, DeepSpeed compiles and loads its
    all-reduce in shared memory then, which takes a C++ compiler and a minute at first, and the lock
    at each start. On a GPU DeepSpeed has no such operation.
    """
    from deepspeed import ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":  # asking for the table takes a second
        ops.__compatible_ops__[SHARED_MEMORY] = False
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        _warn_of_locks()


def _warn_of_locks() -> None:
    """Name each lock that no process of this user on this machine holds."""
    locks = _locks()
    if not locks:
        return
    for lock in sorted(locks - _open_files()):
        if lock.exists():  # its process may have just deleted it
            logger.warning(
                "%s: left by a process that was killed. DeepSpeed waits as long as it is there. "
                "Delete it, unless another user or machine that shares this folder is compiling.",
                lock,
            )


def _locks() -> set[Path]:
    """Locks in the folder in which PyTorch compiles operations."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return {path.resolve() for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)}


def _open_files() -> set[Path]:
    """Files that the processes of this user have open."""
    found: set[Path] = set()
    for process in psutil.process_iter():
        try:
            found.update(Path(each.path) for each in process.open_files())
        except psutil.Error:  # it has just ended, or belongs to another user
            continue
    return found
