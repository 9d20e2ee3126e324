"""Config options of a model: which of them can change a log-prob, and which change its logits."""

from __future__ import annotations

from typing import Any

# Options of model families that change the logits after the head. `dpofast.model.head` applies
# them, and `dpofast.reference.identity.readable` describes them.
SOFTCAP_OPTIONS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
LOGIT_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
LOGIT_DIVISORS = ("logits_scaling",)
# Model types that multiply by the options that others divide by.
MULTIPLY_BY_DIVISORS = frozenset({"hyperclovax"})

# Options that can't change the log-prob of given token ids. Every option that isn't listed counts:
# an unknown option of a future model then causes a needless miss, never a wrong hit.
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
        # A tied tensor is hashed under each of its names, exactly like two tensors that are equal.
        "tie_word_embeddings",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
    }
)
# Parts of the names of dropout options: references score in eval mode, where dropout is off.
NEUTRAL_PARTS = ("dropout", "pdrop", "layerdrop")


def scoring_options(options: dict[str, Any]) -> dict[str, Any]:
    """Select the options that can change a log-prob, from a config's dict and the dicts in it."""
    kept = {}
    for name, value in options.items():
        if name in NEUTRAL_OPTIONS or any(part in name for part in NEUTRAL_PARTS):
            continue
        kept[name] = scoring_options(value) if isinstance(value, dict) else value
    return kept
