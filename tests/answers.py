"""Unpaired rows of random ids, and a KTOTrainer for them."""

from __future__ import annotations

import random

from datasets import Dataset

from dpofast import KTOConfig, KTOTrainer
from tests.support import BETA, LEARNING_RATE, VOCAB_SIZE, byte_tokenizer, tiny_llama


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
    config = KTOConfig(
        **{
            "output_dir": str(folder / "run"),
            "reference_store": str(folder / "store"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "beta": BETA,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "max_steps": 6,
            "logging_steps": 1,
            "save_strategy": "no",
            "overwrite_output_dir": True,
            "report_to": [],
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
            **(options or {}),
        }
    )
    return trainer_class(
        tiny_llama() if model is None else model,
        args=config,
        train_dataset=answer_rows() if rows is None else rows,
        processing_class=byte_tokenizer(),
        **more,
    )
