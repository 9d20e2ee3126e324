"""The head's Triton back ends, compiled, on a CUDA or ROCm device."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from dpofast_kernels import LOSSES as REGISTRY
from dpofast_kernels import (
    DivergenceLoss,
    HeadOptions,
    PairExtras,
    backend_for,
    linear_logps,
    linear_pair_loss,
    make_loss,
    make_mixture,
)
from dpofast_kernels.head import HeadTraits, chunked, probe_head
from dpofast_kernels.head.options import NO_EXTRAS
from dpofast_kernels.head.workspace import ChunkLimits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

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


@pytest.fixture
def chunk_rows(monkeypatch):
    """A function that sets the most rows of a chunk, whatever fits the workspace."""

    def limit(rows: int) -> None:
        monkeypatch.setattr(chunked, "chunk_limits", lambda *_: ChunkLimits(rows, rows, rows))

    return limit


@pytest.fixture
def scored_rows(monkeypatch) -> list[int]:
    """A list that the number of rows of every scored chunk is appended to."""
    numbers = []
    score = chunked.ChunkedHead.score

    def counting(head, rows, *given, **named):
        numbers.append(rows.stop - rows.start)
        return score(head, rows, *given, **named)

    monkeypatch.setattr(chunked.ChunkedHead, "score", counting)
    return numbers


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("auto", torch.float32),
        ("auto", torch.bfloat16),
        ("auto", torch.float16),
        ("triton_fused", torch.bfloat16),
        ("triton_fused", torch.float16),
    ],
)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("hidden_size", [256, 123])
@pytest.mark.parametrize("op", [run, run_logps])
def test_triton_is_the_float64_truth(op, hidden_size, full, backend, dtype):
    """Rows of 123 numbers don't have the alignment that block loads and matrix units want."""
    tensors = with_reference_nearby(inputs(dtype, hidden_size), full)
    fuses = dtype == torch.bfloat16 and torch.version.hip is None
    assert backend_for(tensors["weight"]) == ("triton_fused" if fuses else "triton")
    truth = op(tensors, "naive", torch.float64, full)
    assert_close(op(tensors, backend, dtype, full), truth, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_start_up_check_passes(softcap, dtype):
    traits = HeadTraits(dtype, hidden_size=256, vocab_size=151_936, softcap=softcap)
    assert probe_head("cuda", traits) in BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_gradient_rounded_at_once_is_no_less_exact_than_naive(backend):
    """The upstream gradient of `run` is LOSS_SCALE, and known beforehand."""
    tensors = with_reference_nearby(inputs(torch.bfloat16, lengths=(11, 7) * 64))
    truth = run(tensors, "naive", torch.float64)
    naive = run(tensors, "naive", torch.bfloat16)
    leaves = leaves_of(tensors, torch.bfloat16)
    options = HeadOptions(backend=backend, upstream=LOSS_SCALE)
    loss = linear_pair_loss(**{**tensors, **leaves}, loss=LOSSES["sigmoid"], options=options).loss
    (gradient,) = torch.autograd.grad(LOSS_SCALE * loss, [leaves["weight"]])
    error = relative(gradient.double(), truth["weight"])
    assert error <= relative(naive["weight"], truth["weight"])


def test_bf16_gradients_are_no_less_exact_than_naive():
    """There are many pairs, and no single coefficient's rounding decides."""
    tensors = with_reference_nearby(inputs(torch.bfloat16, lengths=(11, 7) * 64))
    truth = run(tensors, "naive", torch.float64)
    got, naive = (run(tensors, backend, torch.bfloat16) for backend in ("triton", "naive"))
    for name in ("hidden_states", "weight"):
        error = relative(got[name], truth[name])
        assert error <= 3e-3, name
        assert error <= relative(naive[name], truth[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [20, 50, 140])
@pytest.mark.parametrize("loss", LOSSES)
def test_long_pairs_and_chunks(loss, rows, backend, chunk_rows, scored_rows):
    """Pairs have 42, 275 and 131 rows: some fit a chunk, some are longer."""
    tensors = inputs(torch.bfloat16)
    truth = run(tensors, "naive", torch.float64, loss=loss)
    chunk_rows(rows)
    got = run(tensors, backend, torch.bfloat16, loss=loss)
    assert_close(got, truth, TOLERANCES[torch.bfloat16])
    assert len(scored_rows) >= 3
    # All these losses have a direction, so the first long pair is computed once. Of a later one
    # the last piece is: of 15 and 17 rows, or of 43.
    again = {20: 275 - 15 + 131 - 17, 50: 131 - 43, 140: 0}[rows]
    assert sum(scored_rows) == sum(LENGTHS) + again
    assert max(scored_rows) <= rows


@pytest.mark.parametrize("rows", [50, 10_000])
@pytest.mark.parametrize("loss", sorted(ALL_LOSSES.keys() - LOSSES.keys()))
def test_every_loss_is_the_float64_truth(loss, rows, chunk_rows):
    tensors = inputs(torch.bfloat16)
    if loss == "orpo":  # which knows odds only of log-probs, not of log-ratios above 0
        tensors["ref_logps"] = torch.zeros_like(tensors["ref_logps"])
    truth = run(tensors, "naive", torch.float64, loss=loss)
    chunk_rows(rows)
    assert_close(run(tensors, "auto", torch.bfloat16, loss=loss), truth, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [50, 300, 10_000])
@pytest.mark.parametrize("loss", ["cdpo", "apo_down", "simpo"])
def test_pairs_of_any_sequences_with_all_extras(loss, rows, backend, device, chunk_rows):
    """Sequences 4 and 5 are in no pair, 0 and 1 in several; the group of 0 to 3 has 317 rows."""
    tensors = inputs(torch.bfloat16)
    given = {
        "weights": torch.tensor([0.5, 2.0, 1.0, 0.0]),
        "coefficients": torch.tensor([0.0, -0.02, 0.01, 0.0, -0.02, -0.01]),
        "token_weights": torch.linspace(0.2, 1.0, sum(LENGTHS)),
    }
    if ALL_LOSSES[loss].takes_label_smoothing:
        given["label_confidence"] = torch.tensor([0.9, 0.5, 0.7, 1.0])
    pairs = torch.tensor([[0, 1], [2, 0], [1, 3], [1, 2]])
    extras = PairExtras(pairs=pairs, **{name: each.to(device) for name, each in given.items()})
    truth = run(tensors, "naive", torch.float64, loss=loss, extras=extras)
    chunk_rows(rows)
    got = run(tensors, backend, torch.bfloat16, loss=loss, extras=extras)
    assert_close(got, truth, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_chunks_of_per_token_logps(full, backend, chunk_rows, scored_rows):
    tensors = inputs(torch.bfloat16)
    truth = run_logps(tensors, "naive", torch.float64, full)
    chunk_rows(50)
    got = run_logps(tensors, backend, torch.bfloat16, full)
    assert_close(got, truth, TOLERANCES[torch.bfloat16])
    assert len(scored_rows) > 9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [50, 10_000])
def test_a_frozen_head_gets_no_gradient(rows, backend, chunk_rows):
    tensors = inputs(torch.bfloat16)
    truth = run(tensors, "naive", torch.float64)
    chunk_rows(rows)
    leaves = leaves_of(tensors, torch.bfloat16)
    leaves["weight"].requires_grad_(False)
    options = HeadOptions(backend=backend)
    output = linear_pair_loss(**{**tensors, **leaves}, loss=LOSSES["sigmoid"], options=options)
    (output.loss * LOSS_SCALE).backward()
    assert leaves["weight"].grad is None
    got = leaves["hidden_states"].grad.double()
    assert relative(got, truth["hidden_states"]) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [linear_pair_loss, linear_logps])
def test_bf16_autocast_of_an_fp32_weight(op, hidden_dtype, backend):
    tensors = inputs(torch.float32)
    rounded = {name: tensors[name].bfloat16() for name in ("hidden_states", "weight")}
    truth_of = run if op is linear_pair_loss else run_logps
    truth = truth_of({**tensors, **rounded}, "naive", torch.float64)
    mixed = {**tensors, "hidden_states": tensors["hidden_states"].to(hidden_dtype)}
    leaves = {name: mixed[name].detach().requires_grad_() for name in ("hidden_states", "weight")}
    options = HeadOptions(backend=backend)
    with torch.autocast("cuda", torch.bfloat16):
        if op is linear_pair_loss:
            output = op(**{**mixed, **leaves}, loss=LOSSES["sigmoid"], options=options)
            loss, results = output.loss * LOSS_SCALE, {"loss": output.loss, "logps": output.logps}
        else:
            logps = op(**leaves, labels=mixed["labels"], options=options)
            assert logps.dtype == torch.float32
            loss = (logps * torch.linspace(-1.0, 2.0, len(logps), device="cuda")).sum()
            results = {"logps": logps}
    loss.backward()
    assert_close(in_float64(results, leaves), truth, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [507, 32003, 151936])
def test_per_token_logps_are_within_1e_4(backend, dtype, vocab_size):
    """The logits spread widely, so rounding one to the inputs' dtype would show."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden_states = torch.randn(123, 896, generator=generator, device="cuda").to(dtype)
    weight = torch.randn(vocab_size, 896, generator=generator, device="cuda").mul_(0.2).to(dtype)
    labels = torch.randint(vocab_size, (123,), generator=generator, device="cuda")
    truth = linear_logps(
        hidden_states.double(), weight.double(), labels, HeadOptions(backend="naive")
    )
    got = linear_logps(hidden_states, weight, labels, HeadOptions(backend=backend))
    assert (got.double() - truth).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [run, run_logps])
def test_labels_of_vanishing_probability(op, dtype, backend):
    """exp(z - z_label) overflows fp32 in some rows and passes the fused MAX_REST in others."""
    tensors = inputs(dtype)
    tensors["hidden_states"][::5] *= 20.0
    tensors["hidden_states"][1::5] *= 5.0
    logits = tensors["hidden_states"].double() @ tensors["weight"].double().t()
    gaps = logits.amax(-1) - logits.gather(-1, tensors["labels"][:, None])[:, 0]
    assert gaps.max() > 89.0
    assert ((gaps > 67.0) & (gaps < 88.0)).any()
    tensors = with_reference_nearby(tensors)
    truth = op(tensors, "naive", torch.float64)
    assert_close(op(tensors, backend, dtype), truth, TOLERANCES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_bit_for_bit(backend):
    tensors = inputs(torch.bfloat16)
    first, second = (run(tensors, backend, torch.bfloat16) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [50, 10_000])
@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_the_device_is_never_waited_for(loss, rows, backend, chunk_rows):
    """With bounds on the CPU, neither the forward nor the backward waits, even for long pairs."""
    tensors = inputs(torch.bfloat16)
    leaves, options = leaves_of(tensors, torch.bfloat16), HeadOptions(backend=backend)
    chunk_rows(rows)

    def step() -> None:
        output = linear_pair_loss(**{**tensors, **leaves}, loss=ALL_LOSSES[loss], options=options)
        torch.autograd.grad(output.loss, list(leaves.values()))

    step()  # compiles, and finds out what the device can do
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        with pytest.raises(RuntimeError, match="synchronizing"):
            tensors["labels"].sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["pair_loss", "logps", "logps without gradient"])
def test_peak_memory_is_far_below_that_of_all_logits(op, backend):
    """32,768 tokens in a workspace of 64 MiB, among them a pair much longer than a chunk."""
    tensors = inputs(torch.bfloat16, hidden_size=64, lengths=(4096, 4096, *[256] * 96))
    leaves = leaves_of(tensors, torch.bfloat16)
    options = HeadOptions(backend=backend, workspace_bytes=2**26)

    def step() -> None:
        if op == "pair_loss":
            given = {**tensors, **leaves}
            loss = linear_pair_loss(**given, loss=LOSSES["sigmoid"], options=options).loss
        else:
            with nullcontext() if op == "logps" else torch.no_grad():
                loss = linear_logps(**leaves, labels=tensors["labels"], options=options).sum()
        if loss.requires_grad:
            torch.autograd.grad(loss, list(leaves.values()))

    step()  # the library allocates memory of its own in its first product
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    all_logits = len(tensors["labels"]) * VOCAB_SIZE * 2  # in bf16
    assert len(tensors["labels"]) == 32768
    assert torch.cuda.max_memory_allocated() - before < all_logits / 8
