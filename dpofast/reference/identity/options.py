"""Which options of a model's config can change a log-prob."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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
