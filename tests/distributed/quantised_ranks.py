"""Trains adapters on 4-bit and 8-bit models on two ranks; for test_quantised_ranks.py.

torchrun --nproc-per-node 2 quantised_ranks.py FOLDER WAY...

FOLDER/model is the model. A way is "ddp" or the name of a DeepSpeed configuration, and the part
behind the dot is the number of bits. The main rank writes losses, gradient norms and the
reference's identity, or the error, to FOLDER/WAY.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import peft

from dpofast.cli.process_end import run_to_end
from dpofast.errors import DPOFastError
from dpofast.options.config import DPOConfig
from dpofast.train.trainer import DPOTrainer
from tests.support import byte_tokenizer, history, token_pairs

LATER = token_pairs(3, seed=78)


def run(way: str, folder: Path) -> None:
    kind, _, bits = way.partition(".")
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by the previous way
    config = DPOConfig(
        output_dir=str(folder / way),
        reference_store=str(folder / "store"),  # all ways have one reference
        per_device_train_batch_size=2,
        learning_rate=5e-3,
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
        model_init_kwargs={"quantization_config": {f"load_in_{bits}bit": True}},
    )
    try:
        trainer = DPOTrainer(
            str(folder / "model"),
            args=config,
            train_dataset=token_pairs(9),
            processing_class=byte_tokenizer(),
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
        )
        trainer.train()
        facts = {
            "history": history(trainer),
            "digest": trainer.reference.identity.digest,
            "later": trainer.evaluate(LATER)["eval_loss"],  # scored below the adapter
        }
    except DPOFastError as error:
        facts = {"error": str(error)}
    if config.process_index == 0:
        (folder / f"{way}.json").write_text(json.dumps(facts))


def main(folder: str, *ways: str) -> int:
    for way in ways:
        run(way, Path(folder))
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
