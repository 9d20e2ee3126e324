"""Trains on streams, on any number of ranks; for test_stream_ranks.py.

torchrun --nproc-per-node 2 stream_ranks.py FOLDER WAY...

FOLDER/model is the model. A way is "ddp" or the name of a DeepSpeed configuration, and the part
behind the dot is what is special: "list" trains on a list of the same rows, "lora" an adapter,
"resumed" from the checkpoint of step 3, "bad" has a bad row, "split" gives each rank other rows and
"late" lets rank 1 fail to read a row. The main rank writes its logs, or every rank's error, to
FOLDER/WAY.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object

from dpofast.cli.process_end import run_to_end
from dpofast.errors import DPOFastError
from dpofast.options.config import DPOConfig
from dpofast.train.data import stream
from dpofast.train.trainer import DPOTrainer
from tests.support import byte_tokenizer, token_pairs

stream.WINDOW_PAIRS = 8  # two steps
ROWS = token_pairs(17).to_list()  # the last step of a pass has one pair, so one rank has none


def rows_of(special: str) -> Iterator[dict[str, Any]]:
    rank = int(os.environ["RANK"])
    for index, row in enumerate(ROWS):
        if index == 13 and special == "late" and rank == 1:
            raise OSError("the network is gone")
        if index == 13 and (special == "bad" or (special == "split" and rank == 1)):
            row = {**row, "chosen_ids": "text" if special == "bad" else [5, 6, 7]}
        yield row


def adapter_of(special: str) -> Any:
    if special != "lora":
        return None
    import peft

    return peft.LoraConfig(target_modules=["q_proj", "v_proj"])


def run(way: str, folder: Path) -> None:
    kind, _, special = way.partition(".")
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by the previous way
    saves = special in ("saved", "resumed")
    config = DPOConfig(
        output_dir=str(folder / ("run" if saves else way)),
        reference_store=str(folder / "store" / way),
        per_device_train_batch_size=4 // int(os.environ["WORLD_SIZE"]),
        max_tokens_per_microbatch=30,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        max_steps=8,
        logging_steps=1,
        save_strategy="steps" if special == "saved" else "no",
        save_steps=3,
        report_to=[],
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        deepspeed=None if kind == "ddp" else kind,
    )
    made = datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"special": special})
    report: dict[str, Any] = {}
    try:
        trainer = DPOTrainer(
            str(folder / "model"),
            args=config,
            train_dataset=ROWS if special == "list" else made,
            processing_class=byte_tokenizer(),
            peft_config=adapter_of(special),
        )
        checkpoint = str(folder / "run" / "checkpoint-3") if special == "resumed" else None
        trainer.train(resume_from_checkpoint=checkpoint)
        report["logs"] = [log for log in trainer.state.log_history if "grad_norm" in log]
    except DPOFastError as error:
        report["errors"] = gather_object([str(error)])
    if int(os.environ["RANK"]) == 0:
        (folder / f"{way}.json").write_text(json.dumps(report))


def main(folder: str, *ways: str) -> int:
    torch.set_num_threads(1)
    for way in ways:
        run(way, Path(folder))
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
