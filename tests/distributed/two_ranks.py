"""Trains in several ways, one after the other, on any number of ranks.

torchrun --nproc-per-node 2 two_ranks.py FOLDER PAIRS_PER_DEVICE ACCUMULATION WAY...

A way is "ddp", the name of a DeepSpeed configuration, or "own" for a user's configuration with its
own batch fields. With the suffix ".bf16" it trains in that precision. With ".mixtral" it trains a
mixture of experts with the routers' auxiliary loss and gradient checkpointing. That runs padded,
because then the micro-batches are the same on any number of ranks. With ".stretched" it trains a
model with dynamic RoPE on sequences beyond its original length. With ".recurrent" it trains a model
with gated delta rules, whose convolutions' weights are used outside of their own modules. With
".hooks" it trains the sigmoid loss written by hand and a penalty that a subclass adds, and measures
metrics of its own. With ".coupled" it trains a loss that depends on all pairs of a step and on
their order. With ".sets" it trains two datasets with weights and soft labels, and evaluates both.
With ".kl" the drift moves beta, of which each rank's betas are written, too. With ".free" it trains
losses without a reference, whose likelihood is a mean over tokens; with ".norm" a loss of means per
token whose pairs have WPO's weights. Both measure all metrics over tokens. With ".grouped" all
pairs of a prompt are in one step, and a part of the loss couples them; and layers recompute as the
memory of the ranks asks for, of which all but the first rank have none. The main rank writes its
logs to FOLDER/WAY.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import softplus

from dpofast import CoupledFunction, DPOConfig, DPOTrainer
from dpofast.cli.process_end import run_to_end
from dpofast.data import mix_preferences
from dpofast.options.metric_fields import TOKEN_METRICS
from dpofast.train.steps import recompute
from tests import family_sizes
from tests.families import tiny_model
from tests.grouped import grouped_pairs
from tests.rope import ORIGINAL_LENGTH, rope_parameters
from tests.support import byte_tokenizer, tiny_llama, tiny_mixtral, token_pairs


def deepspeed_option(way: str, pairs_per_device: int, accumulation: int) -> Any:
    if way == "ddp":
        return None
    if way != "own":
        return way
    return {
        "train_micro_batch_size_per_gpu": pairs_per_device,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": pairs_per_device * accumulation * int(os.environ["WORLD_SIZE"]),
        "zero_optimization": {"stage": 2},
    }


def model_of(variant: str) -> Any:
    if variant == "mixtral":
        return tiny_mixtral()
    if variant == "stretched":
        rope = rope_parameters("dynamic", frequencies=4)
        return tiny_llama(max_position_embeddings=ORIGINAL_LENGTH, rope_parameters=rope)
    if variant == "recurrent":
        return tiny_model("qwen3_5")
    return tiny_llama()


def pairs_of(variant: str) -> tuple[Any, Any]:
    """Pairs to train on and to evaluate; in training, the last step has one, so one rank has none.

    The pair of that step is of one dataset of ".sets", and the rank without pairs logs both.
    """
    if variant == "grouped":  # steps of 6, 4 and 1 pairs
        return grouped_pairs((2, 3, 1, 3, 1, 1)), token_pairs(5, seed=4)
    if variant == "recurrent":
        small = {"vocab_size": family_sizes.VOCAB_SIZE}
        return token_pairs(9, **small), token_pairs(5, seed=4, **small)
    if variant != "sets":
        return token_pairs(9), token_pairs(5, seed=4)
    soft = token_pairs(4).add_column("weight", [1.0, 0.5, 0.0, 3.0])
    soft = soft.add_column("label_confidence", [0.9, 0.5, 1.0, 0.6])
    mixture = mix_preferences({"soft": soft, "hard": token_pairs(5, seed=8)})
    return mixture, mixture.select(range(1, 6))


# Options of the loss by the variant of a way.
LOSSES: dict[str, dict[str, Any]] = {
    # In step 1, gradients of an answer that is chosen and rejected cancel out up to rounding, which
    # Adam would turn into updates of full size.
    "grouped": {
        "group_by_prompt": True,
        "loss_type": ["sigmoid", "aot_unpaired"],
        "adam_epsilon": 1e-4,
    },
    "kl": {"target_kl": 0.3, "target_kl_gain": 1.0},
    "free": {
        "loss_type": ["orpo", "sft"],
        "loss_weights": [1.0, 0.5],
        "metrics": list(TOKEN_METRICS),
    },
    "norm": {
        "loss_type": "sigmoid_norm",
        "label_smoothing": 0.1,
        "use_weighting": True,
        "metrics": list(TOKEN_METRICS),
    },
}


class Penalised(DPOTrainer):
    """Adds a penalty on the weights to the loss."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss + 1e-3 * sum(p.square().sum() for p in model.parameters())
        return (loss, outputs) if return_outputs else loss


def coupled(chosen: torch.Tensor, rejected: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    ranked = chosen.sort()[0] - rejected.sort()[0]
    return softplus(-0.5 * ranked) + softplus(rejected.roll(1) - chosen)


def own_hooks() -> dict[str, Any]:
    """Arguments of a trainer with a loss and metrics of its own."""

    def in_order(prediction: Any) -> dict[str, float]:
        """A number that depends on the order of the pairs."""
        values = prediction.predictions
        return {
            "in_order": sum(i * x for i, x in enumerate(values.chosen_logps)),
            "n": len(values[0]),
        }

    return {
        "loss_fn": lambda chosen, rejected, lengths: softplus(-0.5 * (chosen - rejected)),
        "metrics_fn": lambda pairs: {"own/length": pairs.lengths[:, 0]},
        "compute_metrics": in_order,
    }


def check_reference(trainer: DPOTrainer, kind: str, variant: str) -> None:
    """Check the precision that the reference was scored in."""
    reference = trainer.reference.identity.description
    # DeepSpeed trains weights in the precision itself, so the reference is scored without autocast.
    dtype = "bfloat16" if variant == "bf16" and kind != "ddp" else "float32"
    assert (reference["autocast_dtype"], list(reference["tensors"])) == (None, [dtype])


def train(way: str, folder: Path, pairs_per_device: int, accumulation: int) -> None:
    kind, _, variant = way.partition(".")
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by the previous way
    is_mixture = variant == "mixtral"
    model = model_of(variant)  # before the options: they could make transformers spread its weights
    config = DPOConfig(
        output_dir=str(folder / way),
        reference_store=str(folder / "store" / way),
        per_device_train_batch_size=pairs_per_device,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_tokens_per_microbatch=30,  # several micro-batches per step
        beta=0.5,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        num_train_epochs=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=variant == "bf16",
        gradient_checkpointing="auto" if variant == "grouped" else is_mixture,
        router_aux_loss_coef=0.5 if is_mixture else None,
        layout="padded" if is_mixture else "auto",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        deepspeed=deepspeed_option(kind, pairs_per_device, accumulation),
        **LOSSES.get(variant, {}),
    )
    recompute.free_bytes = lambda _: 0 if config.process_index else 10**12
    has_hooks = variant == "hooks"
    pairs, held_out = pairs_of(variant)
    trainer = (Penalised if has_hooks else DPOTrainer)(
        model,
        args=config,
        train_dataset=pairs,
        eval_dataset=held_out,
        processing_class=byte_tokenizer(),
        **(own_hooks() if has_hooks else {}),
        **({"loss_fn": CoupledFunction(coupled)} if variant == "coupled" else {}),
    )
    trainer.train()
    assert trainer.is_deepspeed_enabled is (kind != "ddp")
    if variant == "grouped":  # as many as the rank with the least memory needs
        assert trainer.recomputation.layers == (2 if config.world_size > 1 else 0)
    if variant != "free":
        check_reference(trainer, kind, variant)
    evaluation = trainer.evaluate()
    if variant == "kl":
        betas = [log["beta"] for log in trainer.state.log_history if "beta" in log]
        (folder / f"{way}.rank{config.process_index}.json").write_text(json.dumps(betas))
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "grad_norm" in log]
        report = {"logs": logs, "evaluation": evaluation}
        (folder / f"{way}.json").write_text(json.dumps(report))


def main(folder: str, pairs_per_device: str, accumulation: str, *ways: str) -> int:
    torch.set_num_threads(1)
    for way in ways:
        train(way, Path(folder), int(pairs_per_device), int(accumulation))
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
