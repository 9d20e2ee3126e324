"""Identifies checkpoints that ZeRO-3 partitions while they load; for test_identity.py.

torchrun --nproc-per-node 2 identity_ranks.py FOLDER CHECKPOINT ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from dpofast.cli.process_end import run_to_end
from dpofast.reference.identity.model import model_identity
from dpofast.zero.weights import gathered

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def main(folder: str, *checkpoints: str) -> int:
    deepspeed.init_distributed("gloo")
    spreads = HfDeepSpeedConfig(CONFIG)  # while it is alive, from_pretrained partitions models
    digests = {}
    for checkpoint in checkpoints:
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        identity = model_identity(
            model, autocast_dtype=None, attention="sdpa", head_version=1, gather=gathered
        )
        assert all(parameter.numel() == 0 for parameter in model.parameters())  # partitioned again
        digests[Path(checkpoint).name] = identity.digest
    del spreads
    Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(digests))
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
