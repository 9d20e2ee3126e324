"""Which model scored: a digest of everything that changes a log-prob, and the same in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpofast.errors import ReferenceStoreError

if TYPE_CHECKING:
    import torch

    Gather = Callable[[torch.Tensor], AbstractContextManager[torch.Tensor]]

DIGEST_CHARS = 32

# What a config holds that can't change a log-prob of given token ids. Whatever isn't named here
# counts, so that an option of a future model makes a needless miss, never a false hit.
NEUTRAL_OPTIONS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "label2id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "prefix",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "tie_word_embeddings",  # every name's tensor is hashed, so tied or only equal is the same
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
    }
)
NEUTRAL_PARTS = ("dropout", "pdrop", "layerdrop")  # references score in eval mode


@dataclass(frozen=True)
class ReferenceIdentity:
    """Who made a row of the store.

    Attributes:
        digest: 32 hexadecimal characters; two references share rows if, and only if, it is equal.
        description: the same in words, JSON types alone; the digest is its SHA-256.

    Raises:
        ReferenceStoreError: the digest doesn't belong to the description.
    """

    digest: str
    description: dict[str, Any] = field(hash=False)

    def __post_init__(self) -> None:
        if self.digest != description_digest(self.description):
            raise ReferenceStoreError(
                f"The reference identity {self.digest!r} does not belong to its description, so "
                "what named it is damaged or was edited; take it from an undamaged copy, or let "
                "the reference be identified anew."
            )

    @classmethod
    def of(cls, description: dict[str, Any]) -> ReferenceIdentity:
        """The identity that a description stands for."""
        plain = json.loads(json.dumps(description, default=str))
        return cls(description_digest(plain), plain)


def description_digest(description: dict[str, Any]) -> str:
    """First 32 hexadecimal characters of SHA-256 over the JSON with sorted keys, no spaces."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]


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
    # The command line reads identities without PyTorch.
    from dpofast.reference.weights import base_model, read_weights

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


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def scoring_options(options: dict[str, Any]) -> dict[str, Any]:
    """What of a config's dict, or of a nested one's, can change a log-prob."""
    kept = {}
    for name, value in options.items():
        if name in NEUTRAL_OPTIONS or any(part in name for part in NEUTRAL_PARTS):
            continue
        kept[name] = scoring_options(value) if isinstance(value, dict) else value
    return kept
