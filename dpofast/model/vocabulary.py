"""Finds token ids outside a model's vocabulary before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from torch import nn

from dpofast.columns import kind_of_columns
from dpofast.errors import DataError
from dpofast.model.parts import body_of, causal_lm, shape
from dpofast.model.place import place_of_pair


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that a model knows: 0 up to `size` - 1.

    Attributes:
        model: name of the model's class.
        size: tokens in the embedding, in the head, or in a further table that is indexed by tokens,
            whichever has fewest.
    """

    model: str
    size: int


def vocabulary_of(model: nn.Module) -> Vocabulary:
    """Reads the vocabulary off the weights, even if ZeRO-3 has spread them over the ranks.

    The weights are what an id indexes; the config's vocab_size can say something else.
    """
    lm: Any = causal_lm(model)
    tables = [lm.get_input_embeddings(), lm.get_output_embeddings()]
    # Gemma 3n and 4 add another embedding of the token in every layer; its table can be smaller.
    tables += [getattr(body_of(lm), "embed_tokens_per_layer", None)]
    weights = [table.weight for table in tables if table is not None]
    return Vocabulary(type(lm).__name__, min(shape(weight)[0] for weight in weights))


def refuse_unknown_ids(pairs: Any, name: str, vocabularies: Iterable[Vocabulary]) -> None:
    """Refuses token ids outside the vocabularies of the models that will run them.

    On a GPU such an id would stop the run with an error that doesn't name it, or read memory past
    the end of the weight.

    Args:
        pairs: tokenised datasets.Dataset of pairs, or of single answers, with the column `row` of
            positions in the user's data.
        name: dataset name, used in messages.
        vocabularies: vocabularies of the models.

    Raises:
        DataError: there is such an id; the message names its row in the user's data.
    """
    columns = kind_of_columns(pairs.column_names).id_columns
    table = pairs.select_columns(list(columns)).with_format("arrow")[:]
    for vocabulary in vocabularies:
        for column in columns:
            ids = pc.list_flatten(table[column])
            # The extremes suffice for nearly every dataset; ids are searched only after they fail.
            limits = pc.min_max(ids).as_py()
            if limits["max"] is None or 0 <= limits["min"] <= limits["max"] < vocabulary.size:
                continue
            values = ids.to_numpy()
            place = int(np.flatnonzero((values < 0) | (values >= vocabulary.size))[0])
            pair = pc.list_parent_indices(table[column])[place].as_py()
            raise DataError(
                f"{place_of_pair(pairs, pair, name)}: the token id {values[place]} in {column} is "
                f"not one of the {vocabulary.size} of {vocabulary.model}: use that "
                "model's tokenizer, or give the model rows for added tokens with "
                "model.resize_token_embeddings(len(tokenizer))."
            )
