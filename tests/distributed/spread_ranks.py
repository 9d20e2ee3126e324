"""Scores references that ZeRO-3 partitions, block by block; for test_spread.py.

torchrun --nproc-per-node 2 spread_ranks.py FOLDER

FOLDER has a folder for each model. Each rank writes FOLDER/rank<N>.json.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from dpofast.cli.process_end import run_to_end
from dpofast.data.packing.collate import Layout
from dpofast.errors import ReferenceStoreError
from dpofast.model.checks import check_head
from dpofast.model.packable import why_not_packed
from dpofast.model.scorer import SequenceScorer
from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.builder import BuildOptions, build_reference
from dpofast.reference.build.ranks import Ranks
from dpofast.reference.store.store import ReferenceStore
from dpofast.train.steps.memory import row_tokens_on_all_ranks
from dpofast.zero.blocks import in_blocks
from dpofast.zero.weights import spread
from tests.distributed.identity_ranks import CONFIG
from tests.reference.stubs import batches_of, identity
from tests.support import make_trainer, token_pairs

BATCH_SEQUENCES = 4
QUIET = BuildOptions(progress=False)


def load(folder: Path) -> Any:
    """Load a model as a run does, with the adapter in the folder's `adapter` if there is one."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if (folder / "adapter").is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "adapter")
    if folder.name == "checkpointed":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def scorer_of(model: nn.Module, with_logsumexps: bool = False) -> SequenceScorer:
    layout = Layout("padded" if why_not_packed(model) else "shared", 0)
    return SequenceScorer(model, contextlib.nullcontext, layout, with_logsumexps)


def detailed_scores(model: nn.Module) -> list[Any]:
    """Per-token log-probs and log-sum-exps of three pairs' answers."""
    pairs = token_pairs(3)
    sequences = [
        (pair["prompt_ids"], pair[f"{side}_ids"])
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    return [scores.tolist() for scores in scorer_of(model, with_logsumexps=True)(sequences)]


def exchange(word: Any) -> list[Any]:
    """Gather a value from every rank."""
    words: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(words, word)
    return words


def build(store: Path, num_pairs: int, scorer: Any) -> Any:
    """Build reference log-probs together with the other ranks."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.barrier)
    return build_reference(
        ReferenceStore.open(store, create=True).namespace(identity()),
        read_answers(token_pairs(num_pairs)),
        scorer,
        batches=batches_of(BATCH_SEQUENCES),
        ranks=ranks,
        options=QUIET,
        exchange=exchange,
    )


@contextlib.contextmanager
def most_whole(parameters: list[Any], model: nn.Module) -> Iterator[list[int]]:
    """Yield a list with one number: the most elements that any module's forward left gathered."""
    most = [0]

    def look(*_: Any) -> None:
        here = [p for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE]
        most[0] = max(most[0], sum(p.numel() for p in here))

    handles = [module.register_forward_hook(look) for module in model.modules()]
    yield most
    for handle in handles:
        handle.remove()


def scored(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Score three batches; return passes, stored rows, and the most elements gathered at once."""
    parameters: list[Any] = spread(model.parameters())
    with most_whole(parameters, model) as most, in_blocks(model):
        check_head(model)
        report = build(folder / "store", 6, scorer_of(model))
    assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in parameters)
    assert all(p.numel() == 0 for p in parameters)
    return {"passes": report.forward_passes, "rows": report.rows_scored, "most": most[0]}


def stopped(store: Path, model: nn.Module) -> str:
    """The message of the error that ends a build if a log-prob is NaN on rank 1."""
    scorer = scorer_of(model)

    def failing(sequences: Any) -> Any:
        logps = scorer(sequences)
        if dist.get_rank() == 1:
            logps[-1][0] = float("nan")
        return logps

    with in_blocks(model):
        try:
            build(store, 6, failing)
        except ReferenceStoreError as caught:
            return str(caught)
    raise AssertionError("nothing was raised")


def in_trainer(root: Path) -> dict[str, Any]:
    """The most elements gathered at once before a run has its engine, and the run's first loss."""
    options = {"deepspeed": "zero3", "per_device_eval_batch_size": 2}
    made = make_trainer(
        root / "trainer", str(root / "llama"), options=options, eval_dataset=token_pairs(5)
    )
    with most_whole(spread(made.model.parameters()), made.model) as most:
        made.score_datasets()
        loss = made.evaluate()["eval_loss"]
        with mock.patch("dpofast.train.steps.memory.free_device_bytes", return_value=10**9):
            assert row_tokens_on_all_ranks(made) > 0
    return {"most": most[0], "loss": loss}


def main(folder: str) -> int:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    rank, root = dist.get_rank(), Path(folder)
    spreads = HfDeepSpeedConfig(CONFIG)  # while it is alive, from_pretrained partitions models
    models = {path.parent: load(path.parent) for path in sorted(root.glob("*/config.json"))}
    report: dict[str, Any] = {path.name: scored(path, model) for path, model in models.items()}
    model = models[root / "llama"]
    with in_blocks(model):
        report["one batch"] = build(root / "one", 2, scorer_of(model)).forward_passes
        report["detailed"] = detailed_scores(model)
        # Each rank has its own folder, where it must score the other's share, too.
        report["apart"] = build(root / f"apart{rank}", 6, scorer_of(model)).forward_passes
    report["nan"] = stopped(root / "nan", model)
    del spreads
    report["trainer"] = in_trainer(root)
    (root / f"rank{rank}.json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
