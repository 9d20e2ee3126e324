"""Twenty steps of a small hybrid on real pairs, and the same by padded DPO with two models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from benchmarks.data import find_data, race_tokenizer
from benchmarks.train_contenders import naive_batch, naive_logps, naive_loss
from dpofast import DPOTrainer
from dpofast.data import load_preferences, tokenize_preferences
from dpofast.data.packing.plan import BatchShape, StepSampler
from tests.support import VOCAB_SIZE, PlainDPO, clip_exactly, make_trainer

STEPS = 20
PAIRS_PER_STEP = 4
NUM_PAIRS = STEPS * PAIRS_PER_STEP
MAX_LENGTH = 192  # longer answers are truncated, because textbook DPO takes long
OPTIONS: dict[str, Any] = {
    "beta": 0.1,
    "layout": "shared",
    "learning_rate": 1e-3,
    "max_steps": STEPS,
    "max_tokens_per_microbatch": 1024,  # a step has several rows
}


def hybrid() -> Qwen3_5ForCausalLM:
    """A Qwen3.5 of four layers: three with a state, then one with attention."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    assert config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    return Qwen3_5ForCausalLM(config)


def fewer_ids(pair: dict[str, list[int]]) -> dict[str, list[int]]:
    """Map ids into the vocabulary of bytes, beyond its special tokens, for a cheaper head."""
    return {name: [3 + token % (VOCAB_SIZE - 3) for token in ids] for name, ids in pair.items()}


def hybrid_pairs() -> Dataset:
    """The pairs of an epoch of twenty steps."""
    path = find_data("dpo_en_demo")[0]
    data = load_preferences(str(path))
    tokenised, _ = tokenize_preferences(data, race_tokenizer(path), max_length=MAX_LENGTH)
    columns = tokenised.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    return columns.select(range(NUM_PAIRS)).map(fewer_ids)


class PaddedDPO(PlainDPO):
    """Textbook DPO with the rows of a step padded to the longest."""

    def step(self, pairs: list[dict[str, list[int]]]) -> tuple[float, float]:
        self.model.train()
        batch = naive_batch(pairs, 0, "cpu")
        with torch.no_grad():
            ref_logps = naive_logps(self.reference, *batch)
        loss = naive_loss(naive_logps(self.model, *batch), ref_logps)
        loss.backward()
        norm = clip_exactly(self.model.parameters(), self.max_norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm


def padded_history(pairs: Dataset) -> np.ndarray:
    """[20, 2] fp64: loss and gradient norm of each step of padded DPO with two models."""
    plain = PaddedDPO(hybrid(), OPTIONS["beta"], OPTIONS["learning_rate"])
    history = np.asarray(plain.train(pairs, PAIRS_PER_STEP, STEPS, seed=3))
    assert np.abs(history[:, 0] / math.log(2) - 1.0).max() > 0.05  # it learns
    return history


def hybrid_trainer(folder: Path, pairs: Dataset, **options: Any) -> DPOTrainer:
    """Make a trainer for the same steps."""
    return make_trainer(folder, hybrid(), pairs, options=OPTIONS | options)


def watch_body(trainer: DPOTrainer) -> list[int]:
    """The tokens of each pass of the body from now on; the reference is scored before."""
    trainer.score_datasets()
    counts: list[int] = []
    trainer.model.model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: counts.append(inputs[0].numel())
    )
    return counts


def planned_rows(trainer: DPOTrainer) -> list[int]:
    """The tokens of each row of this rank, as the plan counts them."""
    limit, config = trainer.train_set().token_limit, trainer.args
    shape = BatchShape(2, config.gradient_accumulation_steps, config.world_size)
    steps = StepSampler(NUM_PAIRS, shape, config.process_index, seed=3, limit=limit)
    return [
        sum(limit.lengths[pair] for pair in row) for step in steps for row in step.micro_batches
    ]


def distinct_tokens(pairs: Dataset) -> int:
    """Tokens of all pairs, with what both sequences of a pair begin with counted once."""
    total = 0
    for pair in pairs:
        chosen, rejected = (
            pair["prompt_ids"] + pair[side] for side in ("chosen_ids", "rejected_ids")
        )
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        total += len(chosen) + len(rejected) - shared
    return total
