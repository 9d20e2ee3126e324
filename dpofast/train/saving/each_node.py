"""What is missing in the checkpoints of nodes without rank 0, as save_on_each_node saves them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from dpofast.model.parts import causal_lm


@contextmanager
def saved_by_this_rank(model: nn.Module) -> Iterator[None]:
    """Let `save_pretrained(is_main_process=True)` write on this rank, whichever it is.

    transformers 5.17 writes on rank 0 of all nodes only, whatever `is_main_process` says. So the
    checkpoints of the other nodes would have no weights.

    Args:
        model: the model, or an adapter's model, with all of its weights on this rank.
    """
    lm = causal_lm(model)
    lm.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del lm.should_save_on_this_rank


def write_latest(folder: Path) -> None:
    """Write the file by which DeepSpeed finds its part of a checkpoint again.

    DeepSpeed writes it on rank 0 of all nodes only, also if each node has a folder of its own.

    Args:
        folder: the checkpoint's folder, with one folder of DeepSpeed's in it.
    """
    (tag,) = [path.name for path in folder.glob("global_step*") if path.is_dir()]
    (folder / "latest").write_text(tag, encoding="utf-8")
