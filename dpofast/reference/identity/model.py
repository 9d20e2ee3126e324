"""Makes the identity of a model from everything that changes its log-probs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.reference.identity.options import scoring_options
from dpofast.reference.identity.quantised import dtype_name
from dpofast.reference.identity.weights import Gather, base_model, read_weights

# Entry of the description of models whose RoPE depends on the length of a sequence. Older versions
# took the length of the longest sequence in a batch, and made no entry. Other models still have
# none, so their rows keep their identity.
ROPE_ENTRY = {"rope_length_from": "each sequence"}


def model_identity(
    model: torch.nn.Module,
    *,
    scoring_dtype: torch.dtype | None = None,
    autocast_dtype: torch.dtype | None,
    attention: str,
    head_version: int,
    rope_depends_on_length: bool = False,
    layers: Sequence[str] = (),
    gather: Gather | None = None,
) -> ReferenceIdentity:
    """Identify a model by what determines its log-probs, however it was loaded.

    A PEFT adapter that contributes nothing (a fresh LoRA adapter, or one that is switched off) is
    left out, so the model has the identity of its base model. An adapter that contributes is part
    of the identity.

    Args:
        model: transformers causal LM, or a PeftModel around one.
        scoring_dtype: dtype in which saved floating-point tensors are hashed; None for each
            tensor's own dtype.
        autocast_dtype: dtype of the autocast context in which the model scores; None without
            autocast.
        attention: name of the attention implementation.
        head_version: version of the code that turns hidden states into log-probs.
        rope_depends_on_length: whether RoPE has other frequencies for longer sequences; the model
            must have scored each sequence with those of its own length.
        layers: names of layers that run in place of the model's own; without any there is no entry,
            so that rows of earlier versions keep their identity.
        gather: context manager that makes a sharded tensor whole. With it, all ranks must call
            this function at the same time; they visit the tensors in the same order.

    Raises:
        ModelError: a tensor isn't whole in this process and `gather` is None, or an adapter
            can't be identified.
    """
    weights = read_weights(model, scoring_dtype, gather, autocast_dtype)
    config = scoring_options(base_model(model).config.to_dict())
    quantised = {}
    if weights.quantised:  # the layers tell more than the config, which says how they were made
        config.pop("quantization_config", None)
        quantised = {"quantised": weights.quantised}
    return ReferenceIdentity.of(
        {
            "weights": weights.digest,
            "tensors": weights.tensors,
            "adapter": weights.adapter,
            "autocast_dtype": None if autocast_dtype is None else dtype_name(autocast_dtype),
            "attention": attention,
            "head_version": head_version,
            "config": config,
            **quantised,
            **(ROPE_ENTRY if rope_depends_on_length else {}),
            **({"layers": list(layers)} if layers else {}),
        }
    )


def differ_by_rounding(one: ReferenceIdentity, other: ReferenceIdentity) -> bool:
    """Whether two references differ by nothing but the code that runs their layers."""
    code = dict.fromkeys(("attention", "layers"))
    return {**one.description, **code} == {**other.description, **code}


def current_identity(
    recorded: ReferenceIdentity, rope_depends_on_length: bool
) -> ReferenceIdentity:
    """The identity that a reference has in this version, if an older one recorded it.

    Args:
        recorded: identity that a checkpoint recorded.
        rope_depends_on_length: as for `model_identity`.
    """
    if not rope_depends_on_length:
        return recorded
    return ReferenceIdentity.of({**recorded.description, **ROPE_ENTRY})
