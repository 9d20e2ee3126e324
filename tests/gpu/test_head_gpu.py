"""The head's back ends, those of Triton compiled, on a CUDA or ROCm device."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from dpofast_kernels import (
    HeadOptions,
    PairExtras,
    backend_for,
    linear_logps,
    linear_pair_loss,
)
from dpofast_kernels.head import HeadTraits, probe_head
from tests.gpu.head_cases import (
    ALL_LOSSES,
    BACKENDS,
    LENGTHS,
    LOSS_SCALE,
    LOSSES,
    TOLERANCES,
    VOCAB_SIZE,
    assert_close,
    in_float64,
    inputs,
    leaves_of,
    relative,
    run,
    run_logps,
    with_reference_nearby,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("auto", torch.float32),
        ("auto", torch.bfloat16),
        ("auto", torch.float16),
        ("triton_fused", torch.bfloat16),
        ("triton_fused", torch.float16),
        ("torch", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("hidden_size", [256, 123])
@pytest.mark.parametrize("op", [run, run_logps])
def test_a_back_end_is_the_float64_truth(op, hidden_size, full, backend, dtype):
    """Rows of 123 numbers don't have the alignment that block loads and matrix units want."""
    tensors = with_reference_nearby(inputs(dtype, hidden_size), full)
    fuses = dtype == torch.bfloat16 and torch.version.hip is None
    assert backend_for(tensors["weight"]) == ("triton_fused" if fuses else "triton")
    truth = op(tensors, "naive", torch.float64, full)
    assert_close(op(tensors, backend, dtype, full), truth, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_start_up_check_passes(softcap, dtype):
    """By every name that a run can give; only narrow dtypes are multiplied by "triton_fused"."""
    traits = HeadTraits(dtype, hidden_size=256, vocab_size=151_936, softcap=softcap)
    assert probe_head("cuda", traits) in BACKENDS
    for name in ("torch", *BACKENDS):
        if name == "triton_fused" and dtype == torch.float32:
            with pytest.raises(ValueError, match="choose backend 'triton'"):
                probe_head("cuda", replace(traits, backend=name))
        else:
            assert probe_head("cuda", replace(traits, backend=name)) == name


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
