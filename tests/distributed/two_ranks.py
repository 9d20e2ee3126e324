"""One training run on however many ranks started it; the main one writes its logs as JSON.

torchrun --nproc-per-node 2 two_ranks.py FOLDER PAIRS_PER_DEVICE ACCUMULATION [ZERO_STAGE [MODEL]]

MODEL is llama, or mixtral: padded, so that micro-batches are the same on however many ranks, with
gradient checkpointing and the routers' auxiliary loss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dpofast import DPOConfig, DPOTrainer
from tests.support import byte_tokenizer, tiny_llama, tiny_mixtral, token_pairs


def zero_config(stage: str) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": int(stage)},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def main(
    folder: str, pairs_per_device: str, accumulation: str, stage: str = "", model: str = "llama"
) -> None:
    torch.set_num_threads(1)
    is_mixture = model == "mixtral"
    config = DPOConfig(
        output_dir=f"{folder}/run",
        reference_store=f"{folder}/store",
        per_device_train_batch_size=int(pairs_per_device),
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=int(accumulation),
        beta=0.5,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        num_train_epochs=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        gradient_checkpointing=is_mixture,
        router_aux_loss_coef=0.5 if is_mixture else None,
        layout="padded" if is_mixture else "auto",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        deepspeed=zero_config(stage) if stage else None,
    )
    trainer = DPOTrainer(
        tiny_mixtral() if is_mixture else tiny_llama(),
        args=config,
        train_dataset=token_pairs(9),  # the last step has one pair: a rank is left without
        eval_dataset=token_pairs(5, seed=4),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    evaluation = trainer.evaluate()
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "grad_norm" in log]
        report = {"logs": logs, "evaluation": evaluation}
        Path(folder, "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
