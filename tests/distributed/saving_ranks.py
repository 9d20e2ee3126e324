"""Trains under ZeRO-3, saves, and compares the saved names; for test_saving.py.

torchrun --nproc-per-node 2 saving_ranks.py FOLDER

FOLDER has a folder `model`. Rank 0 writes FOLDER/found.json.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig

from dpofast import DPOTrainer
from dpofast.cli.process_end import run_to_end
from dpofast.model.saved_names import difference_in_files, difference_in_memory
from tests.support import make_trainer

LORA = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])


class Records(logging.Handler):
    """Keeps what the comparison logs, which is why it couldn't compare."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def saved(root: Path, way: str) -> DPOTrainer:
    options: dict[str, Any] = {
        "deepspeed": "zero3",
        "max_steps": 1,
        "logging_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    }
    peft_config = LORA if way == "lora" else None
    trainer = make_trainer(
        root / way, str(root / "model"), options=options, peft_config=peft_config
    )
    trainer.train()
    trainer.save_model(str(root / way / "saved"))
    trainer.accelerator.wait_for_everyone()  # rank 0 writes the files that all ranks look at
    return trainer


def main() -> int:
    root = Path(sys.argv[1])
    records = Records()
    logger = logging.getLogger("dpofast.model.saved_names")
    logger.addHandler(records)
    logger.setLevel(logging.DEBUG)
    found = {}
    for way in ("full", "lora"):
        trainer = saved(root, way)
        model = trainer.model
        before = str(difference_in_memory(model))
        after = str(difference_in_files(root / way / "saved", model))
        wrong = str(difference_in_files(root / "wrong", model)) if way == "full" else ""
        found[way] = {"before": before, "after": after, "wrong": wrong}
        cards = sorted(
            str(card.parent.relative_to(root)) for card in (root / way).rglob("README.md")
        )
        assert cards == [f"{way}/{folder}" for folder in ("run", "run/checkpoint-1", "saved")], (
            cards
        )
        # The mean over the pairs of both ranks, not over this rank's.
        train_loss = trainer.state.log_history[-1]["train_loss"]
        assert abs(train_loss - trainer.first_loss) < 1e-6, (train_loss, trainer.first_loss)
    if trainer.is_world_process_zero():
        report = {**found, "could not compare": records.lines}
        (root / "found.json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    run_to_end(main)
