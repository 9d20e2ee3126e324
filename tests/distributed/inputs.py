"""What a command needs to train for a few steps: a model, pairs and a YAML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from dpofast.demo.model import make_tokenizer
from tests.support import tiny_llama

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PAIRS = [
    {"prompt": f"Say {word}.", "chosen": word, "rejected": f"{word}, I guess"} for word in WORDS
]
OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
}


def write_inputs(folder: Path, **options: Any) -> Path:
    """Write them to `folder`, with `run` and `store` in it; returns `folder`."""
    tokenizer = make_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "pairs.json").write_text(json.dumps(PAIRS))
    (folder / "run").mkdir()
    paths = {
        "model_name_or_path": "model",
        "dataset_name": "pairs.json",
        "output_dir": "run",
        "reference_store": "store",
    }
    named = {name: str(folder / path) for name, path in paths.items()}
    (folder / "run.yaml").write_text(yaml.safe_dump(named | OPTIONS | options))
    return folder
