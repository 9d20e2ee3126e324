"""Twenty steps on real pairs, for tests that compare our training with textbook DPO.

The 77 pairs make 19 steps of 4 pairs and a last step of a single pair. If two ranks train, one of
them has no pair in the last step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from benchmarks.data import find_data, race_tokenizer
from benchmarks.train_cases import Case
from dpofast.data import load_preferences, tokenize_preferences
from tests.support import PlainDPO

STEPS = 20
PAIRS_PER_STEP = 4
NUM_PAIRS = 77
SAVED_STEP = 12  # in the middle of the epoch
TOLERANCE = 1e-5
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "max_length": 1024,
    "beta": 0.1,
    "learning_rate": 2e-4,
    "max_tokens_per_microbatch": 2048,
    "save_strategy": "steps",
    "save_steps": SAVED_STEP,
}


def real_tokenizer() -> Any:
    return race_tokenizer(find_data("dpo_en_demo")[0])


def race_model(tokenizer: Any) -> LlamaForCausalLM:
    """A Llama of 4 layers of width 256, with random weights."""
    return Case("race").model(tokenizer)


def real_pairs(tokenizer: Any) -> Dataset:
    data = load_preferences(str(find_data("dpo_en_demo")[0]))
    tokenised, _ = tokenize_preferences(data, tokenizer, max_length=OPTIONS["max_length"])
    columns = tokenised.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    return columns.select(range(NUM_PAIRS))


def plain_history() -> np.ndarray:
    """[20, 2] fp64: loss and gradient norm of each step of textbook DPO."""
    tokenizer = real_tokenizer()
    plain = PlainDPO(race_model(tokenizer), OPTIONS["beta"], OPTIONS["learning_rate"])
    with two_threads():
        history = np.asarray(plain.train(real_pairs(tokenizer), PAIRS_PER_STEP, STEPS, seed=3))
    assert np.abs(history[:, 0] / math.log(2) - 1.0).max() > 0.05  # it learns
    return history


def assert_is_plain_dpo(name: str, got: list[tuple[float, float]], plain: np.ndarray) -> None:
    """Assert that each step's loss and gradient norm equal `plain_history` within 1e-5."""
    worst = np.abs(np.asarray(got) / plain - 1.0).max(0)
    print(f"{name}: worst relative difference of loss {worst[0]:.1e}, norm {worst[1]:.1e}")
    assert (worst <= TOLERANCE).all(), name


def checkpoint(run: Path) -> str:
    """The checkpoint that a run with OPTIONS saves in mid-epoch."""
    return str(run / f"checkpoint-{SAVED_STEP}")


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    """Run PyTorch on two threads: a race between writes to the same position shows only then."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)
