"""Chooses the layout for a model, and says why a model can't be packed."""

from __future__ import annotations

import logging

from torch import nn

from dpofast.data.packing.collate import Layout
from dpofast.errors import ConfigError
from dpofast.model.dropout import describe_noise, dropouts
from dpofast.model.layer_sizes import UnknownSizesError, attention_sizes
from dpofast.model.model_types import ENCODERS, NOT_PACKABLE, PACKABLE
from dpofast.model.parts import ATTENTION_LAYERS, TOKENWISE_LAYERS, causal_lm
from dpofast.model.recurrent import recurrent_family, refuse_renamed, why_not_replaced
from dpofast.model.rope import depends_on_length

logger = logging.getLogger(__name__)


def choose_layout(wanted: str, model: nn.Module, pad_token_id: int) -> Layout:
    """Chooses the layout for a model.

    Args:
        wanted: "shared", "unshared", "padded", or "auto" for the fastest layout that gives right
            results for this model.
        model: the model as it will run; a dropout above 0 can't be packed.
        pad_token_id: fills the ends of padded rows.

    Raises:
        ConfigError: a packed layout is wanted but would be wrong for this model.
        ModelError: the model's family is known to run packed, but this version of transformers
            has other functions in its layers, and the layout isn't "padded".
    """
    # Two runs of an answer that several pairs have would draw other noise.
    padded = Layout("padded", pad_token_id, merges=next(dropouts(model), None) is None)
    if wanted == "padded":
        return padded
    refuse_renamed(causal_lm(model))
    reason = why_not_packed(model)
    if reason is None:
        return Layout("shared" if wanted == "auto" else wanted, pad_token_id)
    if wanted != "auto":
        raise ConfigError(f"layout: {wanted!r} would be wrong here, as {reason}; use 'padded'.")
    logger.info("Layout: padded, as %s.", reason)
    return padded


def why_not_packed(model: nn.Module) -> str | None:
    """The reason why packed rows would be wrong for a model; None if they are right.

    The reason is the rest of a sentence that begins with "Layout: padded, as ".
    """
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    # A class for pictures and text runs its language model, which has a type of its own.
    for model_type in dict.fromkeys((lm.config.model_type, config.model_type)):
        if (reason := _why_type_not_packed(model_type)) is not None:
            return reason
    family = recurrent_family(lm)
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS - TOKENWISE_LAYERS
    if family is not None:
        others -= family.layer_types
    if others:
        return f"its layers of type {', '.join(sorted(others))} mix the sequences of a row"
    if getattr(config, "alibi", False):
        return "its ALiBi counts distances along the row"
    if depends_on_length(lm):
        return "its RoPE depends on the longest position of a row"
    if (reason := why_not_replaced(lm)) is not None:
        return reason
    # Our attention has no dropout of its own. In the layers outside attention, both answers would
    # get the same dropout on the prefix that they share, unlike in separate rows.
    if (noise := next(dropouts(model), None)) is not None:
        return describe_noise(*noise)
    return None


def _why_type_not_packed(model_type: str) -> str | None:
    """The reason why packed rows of a model type would be wrong; None if they are right."""
    if model_type in NOT_PACKABLE:
        return NOT_PACKABLE[model_type]
    if model_type in ENCODERS:
        return "it is an encoder, and hasn't been compared as a decoder"
    if model_type not in PACKABLE:
        return f"model type {model_type!r} isn't known to be right in packed rows"
    return None


def attention_limits(model: nn.Module) -> tuple[int | None, int | None]:
    """The smallest sliding window of a model's layers, and their smallest chunk, in positions.

    A window includes the query's own position. What no layer has is None, and so are both if the
    layers' sizes can't be told.
    """
    try:
        layers = attention_sizes(causal_lm(model).config.get_text_config())
    except UnknownSizesError:
        return None, None
    return (
        min((layer.window for layer in layers if layer.window is not None), default=None),
        min((layer.chunk for layer in layers if layer.chunk is not None), default=None),
    )
