"""linear_statistics and the statistics of scored rows, compared with formulas in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from dpofast_kernels import STATISTICS, linear_scores, linear_statistics
from dpofast_kernels.head import finish_triton, tiled
from dpofast_kernels.head.chunked import ChunkedHead, Wanted
from tests.kernels.head.cases import (
    BACKENDS,
    FULL_OPTIONS,
    PRECISION_CASES,
    SHORT_LENGTHS,
    make_inputs,
    options_for,
    relative_error,
    set_chunk_rows,
)

# Triton runs interpreted: the fast part of these tests compares it with the formulas only.
BACKENDS_OF_MORE = [
    pytest.param(backend, marks=pytest.mark.slow if "triton" in backend else [])
    for backend in BACKENDS
]
ALL_BACKENDS = ("naive", *BACKENDS_OF_MORE)
CERTAIN_LENGTHS = (2, 1)


def statistics_of(inputs, backend, statistics=STATISTICS, **options):
    return linear_statistics(
        inputs.hidden_states,
        inputs.weight,
        inputs.labels,
        statistics,
        options_for(inputs, backend, **options),
    )


def plain_logits(inputs, softcap=None, logit_scale=1.0, temperature=1.0):
    """Finished logits by the formula, in fp64."""
    logits = inputs.hidden_states.detach().double() @ inputs.weight.detach().double().T
    if inputs.bias is not None:
        logits = logits + inputs.bias.detach().double()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def plain_statistics(inputs, **options):
    """The four statistics by their definitions, in fp64 and in the order of STATISTICS."""
    logits = plain_logits(inputs, **options)
    p = torch.softmax(logits, -1)
    return torch.stack(
        [
            torch.special.entr(p).sum(-1),
            logits.sum(-1) / logits.shape[-1],
            (logits.argmax(-1) == inputs.labels).double(),
            p.square().sum(-1).log(),
        ]
    )


def with_top_labels(inputs):
    """The same inputs, where every other label is the most likely token."""
    top = plain_logits(inputs).argmax(-1)
    inputs.labels = torch.where(torch.arange(len(top)) % 2 == 0, top, inputs.labels)
    return inputs


FORMULA_CASES = [
    pytest.param(
        *(backend, full, rows),
        marks=pytest.mark.slow if "triton" in backend and rows == 3 else [],
    )
    for backend in ("naive", *BACKENDS)
    for full in (False, True)
    for rows in (3, 1000)
]


@pytest.mark.parametrize(("backend", "full", "rows"), FORMULA_CASES)
def test_float64_equals_the_formulas(backend, full, rows, monkeypatch):
    options = FULL_OPTIONS if full else {}
    inputs = with_top_labels(make_inputs(bias=full, lengths=SHORT_LENGTHS))
    set_chunk_rows(monkeypatch, rows)
    found = statistics_of(inputs, backend, **options)
    expected = plain_statistics(inputs, **options)
    assert 0 < expected[2].sum() < len(inputs.labels)
    assert not found.requires_grad
    for name, got, value in zip(STATISTICS, found, expected, strict=True):
        assert relative_error(got, value) <= 1e-12, name


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("vocab_size", [1, 2, 129, 1024])
def test_any_size_of_the_vocabulary(backend, vocab_size):
    inputs = make_inputs(vocab_size=vocab_size, lengths=(1, 2))
    found, expected = statistics_of(inputs, backend), plain_statistics(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("columns", [1, 64, 507])
def test_blocks_of_the_vocabulary_change_nothing(columns, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_COLUMNS", columns)
    inputs = with_top_labels(make_inputs(bias=True))
    found = statistics_of(inputs, "torch", **FULL_OPTIONS)
    assert relative_error(found, plain_statistics(inputs, **FULL_OPTIONS)) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_rows_computed_again_equal_the_others(full, monkeypatch):
    """With a bound of 0, every row takes the path for labels of vanishing probability."""
    monkeypatch.setattr(finish_triton, "MAX_REST", 0.0)
    options = FULL_OPTIONS if full else {}
    inputs = with_top_labels(make_inputs(bias=full, lengths=(2, 1)))
    found = statistics_of(inputs, "triton_fused", **options)
    assert relative_error(found, plain_statistics(inputs, **options)) <= 1e-12


@pytest.mark.parametrize(("backend", "dtype", "full"), PRECISION_CASES)
def test_exact_in_every_dtype(backend, dtype, full):
    """No back end rounds logits to a smaller dtype, so the bound is that of fp32 for all."""
    options = FULL_OPTIONS if full else {}
    inputs = make_inputs(dtype, bias=full, vocab_size=1013, lengths=(2, 1))
    inputs = with_top_labels(inputs)
    found = statistics_of(inputs, backend, **options)
    assert found.dtype == torch.float32
    for name, got, value in zip(
        STATISTICS, found, plain_statistics(inputs, **options), strict=True
    ):
        assert relative_error(got.double(), value) <= (0.0 if name == "is_top" else 1e-6), name


@pytest.mark.parametrize("backend", BACKENDS_OF_MORE)
@pytest.mark.parametrize("statistics", [*((name,) for name in STATISTICS), STATISTICS[::-1]])
def test_those_asked_for_in_the_order_asked(backend, statistics):
    inputs = make_inputs(lengths=(1, 2))
    everything = dict(zip(STATISTICS, statistics_of(inputs, backend), strict=True))
    found = statistics_of(inputs, backend, statistics)
    assert torch.equal(found, torch.stack([everything[name] for name in statistics]))


@pytest.mark.parametrize("backend", BACKENDS_OF_MORE)
@pytest.mark.parametrize("keep", [False, True])
def test_log_probs_and_gradients_are_the_same_with_and_without(backend, keep):
    """Bit for bit; only the fused product's tiles, and so its sums, are others."""
    inputs = make_inputs(torch.float32, bias=True, lengths=(2, 1))
    inputs.bias.requires_grad_(False)
    options, rows = options_for(inputs, backend, **FULL_OPTIONS), slice(0, len(inputs.labels))
    results = []
    for statistics in ((), STATISTICS):
        head = ChunkedHead(
            inputs.hidden_states.detach(),
            inputs.weight.detach(),
            inputs.labels,
            options,
            torch.float32,
            backend,
            Wanted(keep, keep, keep),
            statistics,
        )
        scored = head.score(rows)
        assert (scored.statistics is None) == (statistics == ())
        result = [scored.per_token_logps]
        if keep:
            gradients = head.new_gradients()
            head.add_gradients(gradients, rows, scored, torch.linspace(-1.0, 2.0, rows.stop))
            result += [gradients.hidden_states, gradients.weight, gradients.bias]
        else:
            result.append(scored.logsumexps)
        results.append(result)
    expected = statistics_of(inputs, backend, **FULL_OPTIONS)
    torch.testing.assert_close(scored.statistics, expected, rtol=1e-6, atol=0)
    for without, given in zip(*results, strict=True):
        if backend == "triton_fused":
            assert relative_error(given, without) <= 1e-6
        else:
            assert torch.equal(given, without)


def certain_inputs(dtype, gap, at_label):
    """Rows with one token that leads all others by about `gap`: the label, or another token."""
    inputs = make_inputs(torch.float64, hidden_size=128, vocab_size=128, lengths=CERTAIN_LENGTHS)
    generator = torch.Generator().manual_seed(1)
    top = inputs.labels if at_label else (inputs.labels + 1) % 128
    logits = torch.rand(len(top), 128, generator=generator, dtype=torch.float64)
    logits[torch.arange(len(top)), top] = gap + torch.arange(len(top)).double() / 4
    with torch.no_grad():
        inputs.hidden_states.copy_(logits)  # the weight is the identity: these are the logits
        inputs.weight.copy_(torch.eye(128))
    return inputs.to(dtype)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("gap", [18.0, 30.0, 60.0])
def test_a_certain_label(backend, gap):
    """The entropy is as small as 1e-24, and keeps its digits in fp32, except in naive PyTorch."""
    inputs = certain_inputs(torch.float32, gap, at_label=True)
    logits = plain_logits(inputs)
    rest = logits.scatter(-1, inputs.labels[:, None], -math.inf)
    rest = (rest - logits.amax(-1, keepdim=True)).exp()
    differences = logits - logits.amax(-1, keepdim=True)
    total = rest.sum(-1)
    entropy = total.log1p() - (rest * differences).sum(-1) / (1.0 + total)
    log_sum_p2 = rest.square().sum(-1).log1p() - 2.0 * total.log1p()
    assert entropy.max() < 1e-3
    found = dict(zip(STATISTICS, statistics_of(inputs, backend).double(), strict=True))
    assert found["is_top"].eq(1.0).all()
    for got, value in ((found["entropy"], entropy), (found["log_sum_p2"], log_sum_p2)):
        if backend == "naive":
            assert ((got - value).abs() <= 1e-6).all()
        else:
            assert ((got - value).abs() <= 3e-6 * value.abs()).all()


@pytest.mark.parametrize("backend", BACKENDS_OF_MORE)
@pytest.mark.parametrize("gap", [18.0, 60.0])
def test_a_certain_token_that_is_not_the_label(backend, gap):
    """The error is a few roundings of 1; entropy and log_sum_p2 keep their signs."""
    inputs = certain_inputs(torch.float32, gap, at_label=False)
    expected = plain_statistics(inputs)
    found = statistics_of(inputs, backend).double()
    assert found[2].eq(0.0).all()
    assert (found[0] >= 0.0).all()
    assert (found[3] <= 0.0).all()
    # Triton's reference is the label's logit: its sums are larger than 1 by exp(gap).
    bound = gap * 2.0**-20 if "triton" in backend else 2.0**-20
    assert ((found - expected)[[0, 3]].abs() <= bound).all()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_of_ten_thousand(backend, sign):
    inputs = make_inputs(torch.float32, lengths=(2, 2))
    with torch.no_grad():
        inputs.hidden_states[:, 0] = sign * 1e4
        inputs.weight[:, 0] = 1.0
        inputs.weight[:, 1:] *= torch.linspace(0.1, 2e4, 507)[:, None] ** 0.5
    expected = plain_statistics(inputs)
    found = statistics_of(inputs, backend).double()
    assert found.isfinite().all()
    assert expected[1].abs().max() > 9e3
    # A logit of 1e4 has an error of a few 1e-3 in fp32.
    torch.testing.assert_close(found[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("capped", [False, True])
def test_tokens_that_a_bias_rules_out(backend, capped):
    """Among them a label. Only the mean logit is infinite, and with a cap not even that."""
    inputs = with_top_labels(make_inputs(bias=True, lengths=(2, 2)))
    with torch.no_grad():
        inputs.bias[:200] = inputs.bias[400:] = inputs.bias[inputs.labels[3]] = -math.inf
    options = {"softcap": 5.0} if capped else {}
    found, expected = statistics_of(inputs, backend, **options), plain_statistics(inputs, **options)
    assert (found[1] == -math.inf).all() == (not capped)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_tie_counts_as_the_top(backend):
    inputs = make_inputs(lengths=(2, 1), vocab_size=200)
    with torch.no_grad():
        inputs.weight[150] = inputs.weight[7] = 3.0 * inputs.hidden_states[0]
    inputs.labels = torch.tensor([150, 7, 8])
    inputs.hidden_states.data[1] = inputs.hidden_states.data[0]
    (found,) = statistics_of(inputs, backend, ("is_top",))
    assert found.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_row_of_nan_changes_no_other(backend):
    inputs = make_inputs(torch.float32, lengths=(2, 2))
    clean = statistics_of(inputs, backend)
    inputs.hidden_states.data[2] = math.nan
    found = statistics_of(inputs, backend)
    assert found[[0, 1, 3], 2].isnan().all()
    assert found[2, 2] == 0.0
    others = [0, 1, *range(3, len(inputs.labels))]
    assert torch.equal(found[:, others], clean[:, others])


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_no_rows(backend):
    assert statistics_of(make_inputs(lengths=(0, 0)), backend).shape == (4, 0)


def test_scores_stay_a_pair():
    inputs = make_inputs(lengths=(2, 1))
    assert linear_scores(inputs.hidden_states, inputs.weight, inputs.labels).shape == (2, 3)


@pytest.mark.parametrize(
    ("statistics", "error", "message"),
    [
        (("entropie",), ValueError, "Unknown statistic 'entropie' in statistics, expected names"),
        (("entropy", "entropy"), ValueError, "names 'entropy' more than once"),
        ((), ValueError, "statistics is empty: name at least one of entropy, mean_logit"),
        ("entropy", TypeError, "statistics is 'entropy', expected a tuple of names"),
        ((1,), TypeError, r"statistics is \(1,\), expected a tuple of names"),
    ],
)
def test_wrong_names(statistics, error, message):
    inputs = make_inputs(lengths=(2, 1))
    with pytest.raises(error, match=message):
        statistics_of(inputs, "torch", statistics)
