"""Evaluates datasets that are new after training, on two ranks; for test_later_ranks.py.

torchrun --nproc-per-node 2 later_ranks.py FOLDER WAY...

FOLDER/model is the model. A way is "ddp" or the name of a DeepSpeed configuration, and the part
behind the dot is what is trained: "full", "lora" or "dora". The main rank writes the reference
log-probs and the number of passes to FOLDER/WAY.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dpofast.cli.process_end import run_to_end
from dpofast.errors import DPOFastError
from dpofast.options.config import DPOConfig
from dpofast.train.trainer import DPOTrainer
from tests.support import byte_tokenizer, token_pairs

DURING, AFTER = token_pairs(5, seed=77), token_pairs(3, seed=78)


class EvaluateDuring(TrainerCallback):
    trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.trainer.evaluate(DURING)


def run(way: str, folder: Path) -> None:
    kind, _, trained = way.partition(".")
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by the previous way
    config = DPOConfig(
        output_dir=str(folder / way),
        reference_store=str(folder / "store" / way),
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        deepspeed=None if kind == "ddp" else kind,
    )
    adapter = None
    if trained != "full":
        import peft

        names = ["q_proj", "v_proj"]
        adapter = peft.LoraConfig(target_modules=names, use_dora=trained == "dora")
    callback = EvaluateDuring()
    trainer = DPOTrainer(
        str(folder / "model"),
        args=config,
        train_dataset=token_pairs(9),
        processing_class=byte_tokenizer(),
        callbacks=[callback],
        peft_config=adapter,
    )
    callback.trainer = trainer
    report: dict[str, Any] = {}
    try:
        trainer.train()
        report["moved"] = trainer.evaluate(AFTER)["eval_logratios/chosen"]
        for dataset in trainer.data.datasets:
            assert dataset.ref_logps is not None
            report[dataset.name] = dataset.ref_logps.tolist()
        report["losses"] = [log["loss"] for log in trainer.state.log_history if "grad_norm" in log]
    except DPOFastError as error:
        report["error"] = str(error)
    if trainer.is_world_process_zero():
        (folder / f"{way}.json").write_text(json.dumps(report))


def main(folder: str, *ways: str) -> int:
    torch.set_num_threads(1)
    for way in ways:
        run(way, Path(folder))
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
