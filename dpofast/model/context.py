"""How long a sequence a model can take, and which pairs are longer."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from torch import nn

from dpofast.columns import ID_COLUMNS
from dpofast.errors import DataError
from dpofast.model.parts import causal_lm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """The positions of a model.

    Attributes:
        model: the name of its class.
        length: tokens of the longest sequence that it was made for.
        is_hard: it has a table of so many positions, and can't run longer sequences at all. RoPE
            goes on beyond what the model was trained on.
    """

    model: str
    length: int
    is_hard: bool


def context_of(model: nn.Module) -> Context | None:
    """None where positions aren't limited: a state, or distances alone."""
    lm: Any = causal_lm(model)
    config = lm.config.get_text_config()
    if getattr(config, "alibi", False):
        return None
    max_seq_len = getattr(config, "max_seq_len", None)  # of MPT, whose ALiBi is a table
    length = getattr(config, "max_position_embeddings", None) or max_seq_len
    if length is None:
        return None
    return Context(type(lm).__name__, int(length), bool(max_seq_len) or _has_table(lm, length))


def _has_table(lm: Any, length: int) -> bool:
    """Whether positions are looked up, in an embedding or in a buffer [length, ...]."""
    modules = [module for module in lm.modules() if module is not lm.get_input_embeddings()]
    if any("rotary" in type(module).__name__.lower() for module in modules):
        return False
    sizes = [module.num_embeddings for module in modules if isinstance(module, nn.Embedding)]
    sizes += [len(buffer) for buffer in lm.buffers() if buffer.dim() == 2]
    return any(size in (length, length + 2) for size in sizes)  # OPT's begins at the third


def refuse_longer(pairs: Any, name: str, contexts: Iterable[Context]) -> None:
    """Look for pairs that are longer than a model's context, as they were cut.

    Args:
        pairs: tokenised datasets.Dataset.
        name: the dataset's, for the message.
        contexts: of the models that will run them.

    Raises:
        DataError: a model can't run them. With RoPE there is a warning instead.
    """
    table = pairs.select_columns([*ID_COLUMNS, "row"]).with_format("arrow")[:]
    prompt, *answers = (pc.list_value_length(table[column]).to_numpy() for column in ID_COLUMNS)
    lengths = prompt + np.maximum(*answers)  # [n]
    for context in contexts:
        longer = np.flatnonzero(lengths > context.length)
        if not longer.size:
            continue
        longest = int(longer[lengths[longer].argmax()])
        row, tokens = table["row"][longest].as_py(), lengths[longest]
        if context.is_hard:
            raise DataError(
                f"{name}, row {row} (counted from 0): a prompt and its answer have {tokens} "
                f"tokens, and {context.model} has {context.length} positions; set max_length to "
                f"{context.length} or less."
            )
        logger.warning(
            "%s: %d pairs are longer than the %d positions of %s, the longest (row %d) of %d "
            "tokens; unless that is meant, set max_length to %d.",
            *(name, len(longer), context.length, context.model, row, tokens, context.length),
        )
