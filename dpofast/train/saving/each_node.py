"""Lets one rank of each node save the model, as save_on_each_node asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
