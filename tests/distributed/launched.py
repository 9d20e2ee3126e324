"""A user's script: trains on two ranks, whatever starts them, and saves the model.

LAUNCHER launched.py FOLDER [DEEPSPEED]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from dpofast import DPOConfig, DPOTrainer
from dpofast.cli.process_end import run_to_end


def main(folder: Path, deepspeed: str | None = None) -> int:
    config = DPOConfig(
        output_dir=str(folder / "run"),
        reference_store=str(folder / "store"),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        deepspeed=deepspeed,
    )
    pairs = str(folder / "pairs.json")
    trainer = DPOTrainer(
        model=str(folder / "model"), args=config, train_dataset=pairs, eval_dataset=pairs
    )
    assert abs(trainer.evaluate()["eval_loss"] - math.log(2)) < 1e-6  # before the first step
    trainer.train()
    trainer.save_model()
    return 0


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    run_to_end(lambda: main(Path(words[0]), *words[1:]))
