"""Settings in which two ranks run the head: models, wrappers, and the pairs of each rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from dpofast.data.packing.batch import PackedPairs
from dpofast.data.packing.padded_rows import collate_padded
from tests.support import VOCAB_SIZE, tiny_llama, token_pairs

NUM_PAIRS = 6
BETA = 0.5

# Pairs of each micro-batch, for rank 0 and rank 1.
Deal = tuple[tuple[Sequence[int], ...], tuple[Sequence[int], ...]]
HALVES: Deal = (((0, 1, 2),), ((3, 4, 5),))
UNEVEN: Deal = (((0, 1, 2, 3, 4),), ((5,),))
TWO_MICRO_BATCHES: Deal = (((0, 1), (2, 3)), ((4,), (5,)))
ONE_WITHOUT_PAIRS: Deal = (((0, 1), (2, 3)), ((4, 5), ()))


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        stage: stage of ZeRO; None for DDP.
        family: "llama", "tied", "bias" or "gemma2", see `make_model`.
        adapter: place of a LoRA adapter: "attention", "head" or "saved_head"; None without one.
        checkpointing: "reentrant" or "non_reentrant"; None without gradient checkpointing.
        deal: pairs of each micro-batch on each rank.
        op: "pair_loss" in one pass, or "logps", whose backward needs the weight again.
        steps: optimizer steps with learning rate 0; the last one is compared. From the second step
            on, ZeRO-3 knows what will be used again, and keeps or fetches weights accordingly.
        precision: "fp32", "autocast" (fp32 weights, computed in bf16) or "fp16".
        sent_in: under autocast, the dtype in which DeepSpeed sends the weights and gradients of
            linear layers to other ranks; DeepSpeed's default is "bf16".
    """

    stage: int | None
    family: str = "llama"
    adapter: str | None = None
    checkpointing: str | None = None
    deal: Deal = HALVES
    op: str = "pair_loss"
    steps: int = 1
    precision: str = "fp32"
    sent_in: str = "fp32"


CASES = {
    "ddp": Case(None),
    "ddp_tied": Case(None, family="tied"),
    "ddp_gemma2": Case(None, family="gemma2"),
    "ddp_checkpointing": Case(None, checkpointing="non_reentrant"),
    "ddp_uneven": Case(None, deal=UNEVEN),
    "ddp_accumulation": Case(None, deal=TWO_MICRO_BATCHES),
    "zero1": Case(1),
    "zero2": Case(2),
    "zero2_tied": Case(2, family="tied"),
    "zero2_accumulation": Case(2, deal=TWO_MICRO_BATCHES),
    "zero3": Case(3),
    "zero3_reentrant": Case(3, checkpointing="reentrant"),
    "zero3_non_reentrant": Case(3, checkpointing="non_reentrant"),
    "zero3_tied": Case(3, family="tied"),
    "zero3_tied_reentrant": Case(3, family="tied", checkpointing="reentrant"),
    "zero3_tied_non_reentrant": Case(3, family="tied", checkpointing="non_reentrant"),
    "zero3_gemma2": Case(3, family="gemma2"),
    "zero3_bias": Case(3, family="bias"),
    "zero3_uneven": Case(3, deal=UNEVEN),
    "zero3_accumulation": Case(3, deal=TWO_MICRO_BATCHES),
    "zero3_one_without_pairs": Case(3, deal=ONE_WITHOUT_PAIRS),
    "zero3_third_step": Case(3, steps=3),
    "zero3_third_step_tied_non_reentrant": Case(
        3, family="tied", checkpointing="non_reentrant", steps=3
    ),
    "zero3_logps": Case(3, op="logps"),
    "zero3_logps_tied": Case(3, family="tied", op="logps"),
    "zero3_logps_third_step": Case(3, op="logps", steps=3),
    "zero3_lora": Case(3, adapter="attention"),
    "zero3_lora_tied_non_reentrant": Case(
        3, family="tied", adapter="attention", checkpointing="non_reentrant"
    ),
    "zero3_lora_on_the_head": Case(3, adapter="head"),
    "zero3_lora_head_saved_whole": Case(3, adapter="saved_head"),
}

AUTOCAST_CASES = {
    "ddp_autocast": Case(None, precision="autocast"),
    "zero2_autocast": Case(2, precision="autocast"),
    "zero3_autocast": Case(3, precision="autocast"),
    "zero3_autocast_tied": Case(3, family="tied", precision="autocast"),
    "zero3_autocast_sent_in_bf16": Case(3, precision="autocast", sent_in="bf16"),
}

FP16_CASES = {
    "zero2_fp16": Case(2, precision="fp16"),
    "zero3_fp16": Case(3, precision="fp16"),
}


def make_model(case: Case) -> Any:
    """Make the model of a case, with weights large enough for every gradient to matter."""
    if case.family == "gemma2":
        torch.manual_seed(0)
        fields = {**tiny_llama().config.to_dict(), "head_dim": 8, "initializer_range": 0.12}
        fields.pop("model_type")
        config = transformers.Gemma2Config(**fields, final_logit_softcapping=3.0)
        model = transformers.Gemma2ForCausalLM(config)
    else:
        tied = case.family == "tied"
        model = tiny_llama(initializer_range=0.12, tie_word_embeddings=tied)
    if case.family == "bias":
        model.set_output_embeddings(nn.Linear(model.config.hidden_size, VOCAB_SIZE))
    if case.adapter is not None:
        model = _with_lora(model, case.adapter)
    if case.checkpointing is not None:
        reentrant = case.checkpointing == "reentrant"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


def _with_lora(model: Any, where: str) -> Any:
    import peft

    torch.manual_seed(3)
    targets = {
        "attention": {"target_modules": ["q_proj", "v_proj"]},
        "head": {"target_modules": ["q_proj", "lm_head"]},
        "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }
    return peft.get_peft_model(model, peft.LoraConfig(**targets[where], init_lora_weights=False))


def make_batch(indices: Sequence[int], lead: float = 0.0) -> PackedPairs:
    """Batch the pairs with these indices and reference log-probs near those of a random model.

    Args:
        indices: indices into the pairs.
        lead: about how far the policy's margin is above the reference's, in nats.
    """
    pairs = token_pairs(NUM_PAIRS)
    noise = torch.randn(NUM_PAIRS, 2, generator=torch.Generator().manual_seed(1)).tolist()
    sequences, ref_logps = [], []
    for index in indices:
        pair = pairs[index]
        for side, answer in enumerate((pair["chosen_ids"], pair["rejected_ids"])):
            sequences.append((pair["prompt_ids"], answer))
            chance = -len(answer) * math.log(VOCAB_SIZE)
            ref_logps.append(chance + noise[index][side] + (side - 0.5) * lead)
    return collate_padded(sequences, ref_logps)
