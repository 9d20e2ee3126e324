"""Unpaired rows of random ids, and a KTOTrainer for them."""

from __future__ import annotations

import random

from datasets import Dataset

from dpofast import KTOConfig, KTOTrainer
from tests.support import VOCAB_SIZE, byte_tokenizer, run_config, tiny_llama


def answer_rows(num_rows=10, seed=0):
    """Tokenised unpaired rows of random ids; some neighbours have the same prompt."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(low, high))]

    rows, prompt = [], ids(1, 12)
    for number in range(num_rows):
        prompt = prompt if number % 4 == 1 else ids(1, 12)
        label = rng.random() < 0.6 if number > 1 else number == 0
        rows.append({"prompt_ids": prompt, "completion_ids": ids(1, 14), "label": label})
    return Dataset.from_list(rows)


def make_kto(folder, model=None, rows=None, *, options=None, trainer_class=KTOTrainer, **more):
    config = run_config(folder, KTOConfig, options)
    return trainer_class(
        tiny_llama() if model is None else model,
        args=config,
        train_dataset=answer_rows() if rows is None else rows,
        **{"processing_class": byte_tokenizer(), **more},
    )
