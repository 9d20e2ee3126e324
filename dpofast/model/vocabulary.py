"""Token ids that a model has no row for, found before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from torch import nn

from dpofast.columns import ID_COLUMNS
from dpofast.errors import DataError
from dpofast.model.parts import causal_lm, shape


@dataclass(frozen=True)
class Vocabulary:
    """The token ids of a model.

    Attributes:
        model: the name of its class.
        size: rows of its embedding, or of its head where that has fewer.
    """

    model: str
    size: int


def vocabulary_of(model: nn.Module) -> Vocabulary:
    """Read from the weights, also those that ZeRO-3 has spread over the ranks."""
    lm: Any = causal_lm(model)
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    weights = [end.weight for end in ends if end is not None]
    return Vocabulary(type(lm).__name__, min(shape(weight)[0] for weight in weights))


def refuse_unknown_ids(pairs: Any, name: str, vocabularies: Iterable[Vocabulary]) -> None:
    """Look for token ids outside the vocabularies of the models that will run them.

    On a GPU such an id would stop the run in the depths, or read what lies behind the weight.

    Args:
        pairs: tokenised datasets.Dataset.
        name: the dataset's, for the message.
        vocabularies: of the models.

    Raises:
        DataError: there is one; the message has its row.
    """
    table = pairs.select_columns([*ID_COLUMNS, "row"]).with_format("arrow")[:]
    for vocabulary in vocabularies:
        for column in ID_COLUMNS:
            ids = pc.list_flatten(table[column])
            limits = pc.min_max(ids).as_py()
            if limits["max"] is None or 0 <= limits["min"] <= limits["max"] < vocabulary.size:
                continue
            values = ids.to_numpy()
            place = int(np.flatnonzero((values < 0) | (values >= vocabulary.size))[0])
            row = table["row"][pc.list_parent_indices(table[column])[place].as_py()].as_py()
            raise DataError(
                f"{name}, row {row} (counted from 0): the token id {values[place]} in {column} is "
                f"not one of the {vocabulary.size} of {vocabulary.model}: use that model's "
                "tokenizer, or give the model rows for added tokens with "
                "model.resize_token_embeddings(len(tokenizer))."
            )
