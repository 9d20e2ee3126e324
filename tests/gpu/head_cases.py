"""Inputs, losses and comparisons of the tests that run the head's kernels on a device."""

from __future__ import annotations

from dataclasses import replace

import torch

from dpofast_kernels import LOSSES as REGISTRY
from dpofast_kernels import (
    DivergenceLoss,
    HeadOptions,
    PairExtras,
    linear_logps,
    linear_pair_loss,
    make_loss,
    make_mixture,
)
from dpofast_kernels.head.options import NO_EXTRAS

BACKENDS = ("triton", "triton_fused")
LOSS_SCALE = 256.0  # lifts gradients into fp16's range
LENGTHS = (37, 5, 211, 64, 1, 130)
VOCAB_SIZE = 32003
LOSSES = {
    "sigmoid": make_loss("sigmoid", 0.01),
    "cdpo": make_loss("sigmoid", 0.01, label_smoothing=0.2),
    "hinge": make_loss("hinge", 0.01),
    "ipo": make_loss("ipo", 0.01),
}
SMOOTHINGS = {"exo_pair": 1e-3, "robust": 0.1}
ALL_LOSSES = {
    **{name: make_loss(name, 0.01, SMOOTHINGS.get(name, 0.0)) for name in REGISTRY},
    **LOSSES,
    "mixture": make_mixture(["sigmoid", "bco_pair"], [0.8, 0.2], 0.01),
    "divergence": DivergenceLoss(
        beta=0.01, loss=make_loss("sigmoid", 0.01), divergence="js_divergence"
    ),
}
# Largest error relative to a gradient's norm. In bf16 a pair's coefficient is rounded by up to
# 2^-8, and so is the result; with few pairs, how much is chance. In fp16 only the result is.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def inputs(
    dtype: torch.dtype, hidden_size: int = 256, lengths: tuple[int, ...] = LENGTHS
) -> dict[str, torch.Tensor]:
    """Arguments of `linear_pair_loss`; policy and reference give a label about -15 nats."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor((0, *lengths)).cumsum(0)
    rows = sum(lengths)
    hidden_states = torch.randn(rows, hidden_size, generator=generator)
    weight = torch.randn(VOCAB_SIZE, hidden_size, generator=generator) * 0.2
    noise = torch.randn(len(lengths), generator=generator).double()
    return {
        "hidden_states": hidden_states.to("cuda", dtype),
        "weight": weight.to("cuda", dtype),
        "labels": torch.randint(0, VOCAB_SIZE, (rows,), generator=generator).to("cuda"),
        "bounds": bounds,
        "ref_logps": -15.0 * bounds.diff() + 20.0 * noise,
    }


def with_reference_nearby(
    tensors: dict[str, torch.Tensor], full: bool = False
) -> dict[str, torch.Tensor]:
    """The same with a reference so close that no pair's gradient vanishes."""
    logps = run(tensors, "naive", torch.float64, full)["logps"].cpu()
    return {**tensors, "ref_logps": logps + torch.linspace(-40.0, 40.0, len(logps))}


def leaves_of(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: tensors[name].detach().to(dtype).requires_grad_()
        for name in ("hidden_states", "weight")
    }


def options_for(backend: str, dtype: torch.dtype, full: bool) -> HeadOptions:
    """Options without anything, or with `full` a bias, a cap and scales."""
    options = HeadOptions(backend=backend)
    if full:
        bias = torch.linspace(-1.0, 1.0, VOCAB_SIZE, device="cuda").bfloat16().to(dtype)
        options = replace(options, bias=bias, softcap=8.0, logit_scale=0.5, temperature=0.7)
    return options


def run(
    tensors: dict[str, torch.Tensor],
    backend: str,
    dtype: torch.dtype,
    full: bool = False,
    loss: str = "sigmoid",
    extras: PairExtras = NO_EXTRAS,
) -> dict[str, torch.Tensor]:
    """Loss, log-probs and both gradients of `linear_pair_loss`, in float64."""
    leaves, options = leaves_of(tensors, dtype), options_for(backend, dtype, full)
    arguments = {**tensors, **leaves, "loss": ALL_LOSSES[loss]}
    output = linear_pair_loss(**arguments, options=options, extras=extras)
    (output.loss * LOSS_SCALE).backward()
    return in_float64({"loss": output.loss, "logps": output.logps}, leaves)


def run_logps(
    tensors: dict[str, torch.Tensor], backend: str, dtype: torch.dtype, full: bool = False
) -> dict[str, torch.Tensor]:
    """Per-token log-probs and both gradients of `linear_logps`, in float64."""
    leaves, options = leaves_of(tensors, dtype), options_for(backend, dtype, full)
    logps = linear_logps(**leaves, labels=tensors["labels"], options=options)
    upstream = torch.linspace(-1.0, 2.0, len(logps), device="cuda", dtype=logps.dtype)
    (logps * upstream).sum().backward()
    return in_float64({"logps": logps}, leaves)


def in_float64(
    results: dict[str, torch.Tensor], leaves: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype
        results[name] = leaf.grad
    return {name: result.detach().double() for name, result in results.items()}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def assert_close(
    got: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Compare results; the gradient of the hidden states also sequence by sequence."""
    tolerances = {"loss": 1e-4, "logps": 1e-5, "hidden_states": tolerance, "weight": tolerance}
    assert got.keys() == truth.keys()
    for name, expected in truth.items():
        assert relative(got[name], expected) < tolerances[name], name
    parts = zip(
        got["hidden_states"].split(LENGTHS), truth["hidden_states"].split(LENGTHS), strict=True
    )
    for index, (part, expected) in enumerate(parts):
        assert relative(part, expected) < tolerance, f"sequence {index}"
