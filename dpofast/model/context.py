"""The longest sequence that a model can take, and the pairs that are longer."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from torch import nn

from dpofast.columns import kind_of_columns
from dpofast.errors import DataError
from dpofast.model.parts import causal_lm
from dpofast.model.place import place_of_pair

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """The positions that a model has.

    Attributes:
        model: name of the model's class.
        length: tokens of the longest sequence that the model was made for.
        is_hard: True if the positions are a table, so that longer sequences can't run at all. With
            RoPE they can run, but the model wasn't trained on such positions.
    """

    model: str
    length: int
    is_hard: bool


def context_of(model: nn.Module) -> Context | None:
    """The context of a model; None if it has no limit, as with ALiBi or a recurrent state."""
    lm: Any = causal_lm(model)
    config = lm.config.get_text_config()
    if getattr(config, "alibi", False):
        return None
    max_seq_len = getattr(config, "max_seq_len", None)
    length = getattr(config, "max_position_embeddings", None) or max_seq_len
    if length is None:
        return None
    is_hard = config.model_type == "mpt" or _has_table(lm, length)  # MPT's ALiBi is a table
    return Context(type(lm).__name__, int(length), is_hard)


def _has_table(lm: Any, length: int) -> bool:
    """Whether positions are looked up in an embedding, or in a buffer [length, ...]."""
    # The token embedding is left out: a vocabulary could happen to have as many entries as there
    # are positions.
    modules = [module for module in lm.modules() if module is not lm.get_input_embeddings()]
    if any("rotary" in type(module).__name__.lower() for module in modules):
        return False
    # No config says what kind of positions the model has, so a table is recognised by its size.
    sizes = [module.num_embeddings for module in modules if isinstance(module, nn.Embedding)]
    # XGLM's table grows with the sequence: it can be made at any length.
    fixed = [module for module in modules if not hasattr(module, "make_weights")]
    buffers = [buffer for module in fixed for buffer in module.buffers(recurse=False)]
    sizes += [len(buffer) for buffer in buffers if buffer.dim() == 2]
    # OPT's table has two more entries than positions; the first two are unused.
    return any(size in (length, length + 2) for size in sizes)


def refuse_longer(pairs: Any, name: str, contexts: Iterable[Context]) -> list[Context]:
    """Looks for pairs that are longer than a model's context even after truncation.

    Args:
        pairs: tokenised datasets.Dataset of pairs, or of single answers, with the column `row` of
            positions in the user's data.
        name: dataset name, used in messages.
        contexts: contexts of the models that will run the pairs.

    Raises:
        DataError: a model can't run a pair. If it has RoPE, a warning is logged instead.
    """
    columns = kind_of_columns(pairs.column_names).id_columns
    table = pairs.select_columns(list(columns)).with_format("arrow")[:]
    prompt, *answers = (pc.list_value_length(table[column]).to_numpy() for column in columns)
    lengths = prompt + np.max(answers, axis=0)  # [n]
    warned = []
    for context in contexts:
        longer = np.flatnonzero(lengths > context.length)
        if not longer.size:
            continue
        longest = int(longer[lengths[longer].argmax()])
        place, tokens = place_of_pair(pairs, longest, name), lengths[longest]
        if context.is_hard:
            raise DataError(
                f"{place}: a prompt and its answer have {tokens} tokens, and {context.model} has "
                f"{context.length} positions; set max_length to {context.length} or less."
            )
        warned.append(context)
        logger.warning(
            "%s: %d %s are longer than the %d positions of %s, the longest has %d "
            "tokens (%s); unless that is meant, set max_length to %d.",
            *(name, len(longer), "pairs" if len(answers) == 2 else "answers"),
            *(context.length, context.model),
            *(tokens, place, context.length),
        )
    return warned
