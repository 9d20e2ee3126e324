"""Compares two ranks with one process in every case of `head_cases`; the main rank writes JSON.

torchrun --nproc-per-node 2 head_ranks.py REPORT

For each case the report has the relative errors of the loss and of each parameter's gradient. Its
"gathers" say how often ZeRO-3 gathered each weight in each of a few micro-batches.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from dpofast.model.forward import pair_step, run_batch
from dpofast.model.head import PairLossTask, ScoreTask, head_options
from dpofast.model.parts import causal_lm
from dpofast_kernels import (
    HeadOptions,
    PairLossOutput,
    linear_pair_loss,
    make_loss,
    sum_per_sequence,
)
from tests.distributed.gathers import count_gathers
from tests.distributed.head_cases import (
    AUTOCAST_CASES,
    BETA,
    CASES,
    FP16_CASES,
    NUM_PAIRS,
    Case,
    Deal,
    make_batch,
    make_model,
)

LOSS = make_loss("sigmoid", BETA, 0.0)
LOSS_SCALE_POWER = 28
# In fp16 the policy leads so far that a pair's coefficient is about e^-20, too small for fp16. A
# loss scale of 2^28 brings it back to about 1.
FP16_LEAD = 20.0 / BETA


def run_model(model: nn.Module, wrapped: Any, indices: Any, case: Case) -> Tensor:
    """The part that these pairs contribute to the mean loss over all pairs of the step."""
    batch = make_batch(indices, FP16_LEAD if case.precision == "fp16" else 0.0)
    options = head_options(causal_lm(model).config)
    if case.op == "logps":
        with pair_step(model):
            per_token_logps = run_batch(wrapped, batch, ScoreTask(batch.labels, options))  # [N]
        logratios = sum_per_sequence(per_token_logps, batch.bounds) - batch.ref_logps  # [2P]
        return -F.logsigmoid(BETA * (logratios[0::2] - logratios[1::2])).sum() / NUM_PAIRS
    task = PairLossTask(batch.labels, batch.bounds, batch.ref_logps, LOSS, options)
    with pair_step(model):
        output = PairLossOutput(*run_batch(wrapped, batch, task))
    return output.loss / NUM_PAIRS


def autocast(case: Case) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "autocast")


def dealt(deal: Deal) -> list[Any]:
    """The micro-batches of all ranks, in one list."""
    return [indices for rank in deal for indices in rank]


def one_process(case: Case) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in one process.

    In fp32 all pairs are one batch. Under autocast and in fp16 the rounding in the body depends on
    the batch, so the ranks' batches run one after the other.

    Returns:
        The loss, and the gradient of every parameter that gets one.
    """
    case = replace(case, checkpointing=None, op="pair_loss")
    model = make_model(case)
    if case.precision == "fp16":  # DeepSpeed will compute with weights rounded to fp16
        model.half().float()
    total = 0.0
    for indices in [range(NUM_PAIRS)] if case.precision == "fp32" else dealt(case.deal):
        with autocast(case):
            loss = run_model(model, model, indices, case)
        loss.backward()
        total += loss.item()
    named = model.named_parameters()
    return total, {name: p.grad for name, p in named if p.grad is not None}


def exact_head_gradient(case: Case) -> Tensor:
    """[V, H] fp64: gradient of the head's weight, computed from inputs rounded to bf16."""
    model = make_model(case)
    weight = model.lm_head.weight.detach().bfloat16().double().requires_grad_()
    for indices in dealt(case.deal):
        batch = make_batch(indices)
        with pair_step(model), autocast(case):
            hidden_states = run_batch(model, batch, lambda hidden_states, *_: hidden_states)
        rounded = hidden_states.detach().bfloat16().double()  # [N, H]
        options = HeadOptions(backend="naive")
        output = linear_pair_loss(
            rounded, weight, batch.labels, batch.bounds, batch.ref_logps, LOSS, options
        )
        (output.loss / NUM_PAIRS).backward()
    assert weight.grad is not None
    return weight.grad


def zero_config(case: Case, **zero_options: Any) -> dict[str, Any]:
    autocast_config = {"enabled": case.precision == "autocast", "dtype": "bfloat16"}
    if case.sent_in == "fp32":
        autocast_config["lower_precision_safe_modules"] = []
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": len(case.deal[0]),
        # By default ZeRO-3 would keep parameters as small as these gathered.
        "zero_optimization": {
            "stage": case.stage,
            "stage3_param_persistence_threshold": 0,
            **zero_options,
        },
        "fp16": {"enabled": case.precision == "fp16", "initial_scale_power": LOSS_SCALE_POWER},
        "torch_autocast": autocast_config,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def make_engine(model: nn.Module, case: Case, **zero_options: Any) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    config = zero_config(case, **zero_options)
    # DeepSpeed wants a CPU with fp16 instructions, which PyTorch doesn't need.
    get_accelerator().is_fp16_supported = lambda: True
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def under_zero(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    model = make_model(case)
    engine = make_engine(model, case)
    batches = case.deal[dist.get_rank()]
    losses = []
    for index, indices in enumerate(batches * case.steps):
        if index > 0:  # not after the last one: a step clears the gradients
            engine.step()
        losses.append(run_model(model, engine, indices, case))
        # DeepSpeed averages gradients over ranks.
        engine.backward(losses[-1] * dist.get_world_size(), scale_wrt_gas=False)
    total = torch.stack(losses[-len(batches) :]).detach().sum()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scale = engine.optimizer.loss_scale if case.precision == "fp16" else 1.0
    gradients = {name: safe_get_full_grad(p) / scale for name, p in named}
    engine.destroy()
    return total, gradients


def under_ddp(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    model = make_model(case)
    wrapped = nn.parallel.DistributedDataParallel(model)
    total = torch.zeros((), dtype=torch.float64)
    batches = case.deal[dist.get_rank()]
    for index, indices in enumerate(batches):
        waits = index < len(batches) - 1
        with wrapped.no_sync() if waits else contextlib.nullcontext():
            with autocast(case):
                loss = run_model(model, wrapped, indices, case)
            (loss * dist.get_world_size()).backward()
        total += loss.detach()
    return total, {name: p.grad for name, p in model.named_parameters()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.double().norm()).item()


def compare(case: Case) -> dict[str, Any]:
    total, gradients = under_ddp(case) if case.stage is None else under_zero(case)
    dist.all_reduce(total)
    expected_total, expected = one_process(case)
    assert gradients.keys() == expected.keys(), gradients.keys() ^ expected.keys()
    report = {
        "loss": total.item(),
        "loss_error": abs(total.item() / expected_total - 1.0),
        "errors": {name: relative_error(gradients[name], g) for name, g in expected.items()},
        "dtypes": sorted({str(gradient.dtype) for gradient in gradients.values()}),
        "largest": max(gradient.abs().max().item() for gradient in expected.values()),
    }
    if case.precision == "autocast" and case.family != "tied":
        exact = exact_head_gradient(case)
        report["exact_head_error"] = relative_error(gradients["lm_head.weight"], exact)
    return report


def gathers_per_micro_batch(family: str, **zero_options: Any) -> list[dict[str, int]]:
    """How often each weight is gathered in the forward and backward of each micro-batch."""
    case = Case(3, family=family)
    model = make_model(case)
    engine = make_engine(model, case, **zero_options)
    counts = []
    with count_gathers(model) as gathers:
        for _ in range(5):
            gathers.clear()
            engine.backward(run_model(model, engine, case.deal[dist.get_rank()][0], case))
            counts.append(dict(gathers))
            engine.step()
    engine.destroy()
    return counts


def main(report: str) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    cases = {**CASES, **AUTOCAST_CASES, **FP16_CASES}
    if importlib.util.find_spec("peft") is None:
        cases = {name: case for name, case in cases.items() if case.adapter is None}
    results: dict[str, Any] = {}
    for name, case in cases.items():
        print(name, file=sys.stderr, flush=True)  # if a rank fails, this says in which case
        results[name] = compare(case)
    no_prefetch = {"stage3_prefetch_bucket_size": 0}
    results["gathers"] = {
        "default": gathers_per_micro_batch("llama"),
        "tied": gathers_per_micro_batch("tied"),
        "next": gathers_per_micro_batch("llama", stage3_max_reuse_distance=1, **no_prefetch),
        "none": gathers_per_micro_batch("llama", stage3_max_reuse_distance=0, **no_prefetch),
    }
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(results))
    dist.barrier()  # a rank that leaves early would break the other's last collectives
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
