"""Identifies a model by everything that changes a log-prob."""

from __future__ import annotations

import torch

from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.reference.identity.options import dtype_name, scoring_options
from dpofast.reference.identity.weights import Gather, base_model, read_weights


def model_identity(
    model: torch.nn.Module,
    *,
    scoring_dtype: torch.dtype | None = None,
    autocast_dtype: torch.dtype | None,
    attention: str,
    head_version: int,
    gather: Gather | None = None,
) -> ReferenceIdentity:
    """Identify a model by what decides its log-probs, wherever and however it was loaded.

    A PEFT adapter that contributes nothing (a fresh LoRA one, or one switched off) is left out: the
    model counts as the one below it. An adapter that contributes belongs to the identity.

    Args:
        model: transformers causal LM, or a PeftModel around one.
        scoring_dtype: floating-point tensors that are saved are hashed as this; None for each
            tensor's own dtype.
        autocast_dtype: of the context that the model scores in; None without autocast.
        attention: name of the attention implementation.
        head_version: of the code that makes log-probs of hidden states.
        gather: makes the whole of a sharded tensor for the length of a `with` block. All ranks
            then call this function together, and go through the tensors in the same order.

    Raises:
        ModelError: a tensor isn't whole here and there is no `gather`; an adapter that can't be
            identified.
    """
    weights = read_weights(model, scoring_dtype, gather)
    return ReferenceIdentity.of(
        {
            "weights": weights.digest,
            "tensors": weights.tensors,
            "adapter": weights.adapter,
            "autocast_dtype": None if autocast_dtype is None else dtype_name(autocast_dtype),
            "attention": attention,
            "head_version": head_version,
            "config": scoring_options(base_model(model).config.to_dict()),
        }
    )
