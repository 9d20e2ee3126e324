"""What is known about each model type of transformers: packed, padded, or refused, with the reason.

A type is the `model_type` of a causal LM's config. A test compares these lists with transformers'
own list of causal LMs, so that no type is in none of them.
"""

from __future__ import annotations

# Model types whose packed rows give the same as separate sequences. The tests compare hidden states
# and gradients for each of them, and every run compares its own model's hidden states again.
PACKABLE = frozenset(
    """
    afmoe apertus arcee aria_text axk1 bamba beam biogpt bitnet cohere cohere2 cohere2_moe
    cohere_compass_text ctrl cwm dbrx deepseek_v2 deepseek_v3 diffllama dots1 ernie4_5 ernie4_5_moe
    exaone4 exaone_moe falcon_h1 flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n
    gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm4_moe
    glm4_moe_lite got_ocr2 gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe
    granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe
    hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe
    lfm3 llama llama4_text longcat_flash mamba2 mellum mimo_v2_flash minicpm3 minimax_m2 ministral
    ministral3 mistral mixtral moss_transcribe_diarize nanochat nemotron_h olmo olmo2 olmo3
    olmo_hybrid olmoe opt persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open starcoder2
    vaultgemma youtu zamba2
    """.split()  # noqa: SIM905  a list of them would fill pages
)

_NOT_REPLACEABLE = "its attention can't be replaced"
_NOT_TOLD = "its layers don't hand on to attention what it needs to know"
_MASK = "its attention is told what to look at by a mask alone"
_INDEXER = "an indexer, which needs a mask, chooses the tokens that its layers attend to"
_STATE = "its layers with a state or a convolution carry one sequence of a row into the next"
# Model types that run padded, and why. The reason is the rest of a sentence that begins with
# "Layout: padded, as ".
NOT_PACKABLE = {
    **dict.fromkeys(
        ("codegen", "falcon", "git", "gpt_neox_japanese", "gptj", "openai-gpt", "xglm"),
        _NOT_REPLACEABLE,
    ),
    **dict.fromkeys(("bloom", "mpt"), f"{_NOT_REPLACEABLE}, and its ALiBi counts along the row"),
    **dict.fromkeys(("moshi", "nemotron", "stablelm"), _NOT_TOLD),
    **dict.fromkeys(("doge", "gpt_neo"), _MASK),
    **dict.fromkeys(
        ("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4", "minimax_m3_vl_text"),
        _INDEXER,
    ),
    **dict.fromkeys(
        ("bailing_hybrid", "falcon_mamba", "jamba", "mamba", "minimax", "qwen4_exp_text"), _STATE
    ),
    **dict.fromkeys(("recurrent_gemma", "rwkv", "xlstm", "zamba", "zaya"), _STATE),
    "blt": "it groups the bytes of a row into patches",
    "deepseek_v4": "its layers compress the keys of several tokens, which they count along the row",
}

_DECODER_HALF = "the decoder of an encoder-decoder"
_BOTH_WAYS = "a model that looks at later tokens too, so it isn't causal"
_LOST = (
    "a model that transformers loads without its parts for pictures, and couldn't load as a causal "
    "language model after saving"
)
_DRAFTER = "a drafter, which needs the hidden states of another model"
_OWN_HEAD = "whose head has layers of its own, which the loss doesn't know"
_CUT = "a model that cuts its logits to a part of the vocabulary, which the loss doesn't know"
# Model types that transformers lists as causal LMs and that can't be trained, in words that follow
# "The model is ".
REFUSED = {
    **dict.fromkeys(
        ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"),
        _DECODER_HALF,
    ),
    **dict.fromkeys(
        ("musicgen", "musicgen_decoder", "musicgen_melody", "musicgen_melody_decoder", "pegasus"),
        _DECODER_HALF,
    ),
    **dict.fromkeys(("plbart", "prophetnet", "trocr", "whisper"), _DECODER_HALF),
    **dict.fromkeys(("cpmant", "xlm", "xlnet"), _BOTH_WAYS),
    **dict.fromkeys(("emu3", "emu3_text_model", "mllama", "mllama_text_model"), _LOST),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFTER),
    **dict.fromkeys(("inkling2_text", "inkling_text"), _CUT),
    **dict.fromkeys(
        ("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        f"an encoder {_OWN_HEAD}",
    ),
    **dict.fromkeys(
        ("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"),
        f"an encoder {_OWN_HEAD}",
    ),
    **dict.fromkeys(("xlm-roberta-xl", "xmod"), f"an encoder {_OWN_HEAD}"),
    "modernbert-decoder": f"a model {_OWN_HEAD}",
    "reformer": "a model whose attention draws random hashes",
}
# Encoders, which are causal only if their config says `is_decoder: true`. Then they run padded.
ENCODERS = frozenset({"bert-generation"})

# Model types whose class sets the embedding of the pad token to 0 whenever transformers loads it.
PAD_ROW_LOST = frozenset({"youtu"})


def why_refused(config: object) -> str | None:
    """Why a model of this type can't be trained, in words that follow "The model is ".

    Args:
        config: the model's config.

    Returns:
        None if it may be trained.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in ENCODERS and not getattr(config, "is_decoder", False):
        return "an encoder, which isn't causal unless its config says is_decoder: true"
    return REFUSED.get(str(model_type))
