"""linear_sequence_loss: tiled PyTorch and Triton compared with plain autograd."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import (
    SEQUENCE_METRIC_NAMES,
    Answers,
    HeadOptions,
    linear_logps,
    linear_sequence_loss,
    make_loss,
    make_unpaired_loss,
    sum_per_sequence,
)
from dpofast_kernels.head.singles import Singles
from tests.kernels.head.cases import (
    FULL_OPTIONS,
    SHORT_LENGTHS,
    count_scored_rows,
    gradients,
    make_inputs,
    options_for,
    relative_error,
    set_chunk_rows,
)

KTO = make_unpaired_loss("kto", 0.3, 1.5, 0.5)
APO = make_unpaired_loss("apo_zero_unpaired", 0.3)


def answers_of(inputs, z=0.7, weighted=False):
    """Answers with alternating labels, two desirable ones first."""
    count = len(inputs.ref_logps)
    weights = torch.linspace(0.0, 2.0, count, dtype=torch.float64) if weighted else None
    is_desirable = torch.arange(count) % 3 < 2
    z = torch.tensor(z, dtype=torch.float64)
    return Answers(inputs.bounds, inputs.ref_logps, is_desirable, z, weights)


def plain(inputs, answers, loss, options, upstream=1.7):
    """The same by autograd, from all logits at once and TRL's formula."""
    naive = HeadOptions(**{**vars(options), "backend": "naive"})
    logps = sum_per_sequence(
        linear_logps(inputs.hidden_states, inputs.weight, inputs.labels, naive), inputs.bounds
    )
    logratios = logps - answers.ref_logps
    z = answers.z if loss.name == "kto" else 0.0
    desirable = loss.desirable_weight * (1 - torch.sigmoid(loss.beta * (logratios - z)))
    undesirable = loss.undesirable_weight * (1 - torch.sigmoid(loss.beta * (z - logratios)))
    losses = torch.where(answers.is_desirable, desirable, undesirable)
    total = (losses if answers.weights is None else losses * answers.weights).sum()
    (total * upstream).backward()
    metrics = torch.stack([loss.beta * logratios, logratios / inputs.bounds.diff()]).detach()
    found = {"loss": total.detach(), "logps": logps.detach(), "metrics": metrics}
    return found | gradients(inputs)


def run(inputs, answers, loss, options, upstream=1.7):
    output = linear_sequence_loss(
        inputs.hidden_states, inputs.weight, inputs.labels, answers, loss, options
    )
    assert output.loss.dtype == output.logps.dtype == output.metrics.dtype == torch.float64
    assert not output.logps.requires_grad
    assert not output.metrics.requires_grad
    (output.loss * upstream).backward()
    found = {"loss": output.loss.detach(), "logps": output.logps, "metrics": output.metrics}
    return found | gradients(inputs)


def assert_same(found, expected, bound):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert relative_error(value, expected[name]) < bound, name


@pytest.mark.parametrize("rows", [2, 5, 13, 100])
@pytest.mark.parametrize("loss", [KTO, APO], ids=lambda loss: loss.name)
def test_torch_is_exact_however_chunks_are_cut(monkeypatch, loss, rows):
    inputs = make_inputs(bias=True)
    answers = answers_of(inputs, weighted=True)
    options = options_for(inputs, "torch", **FULL_OPTIONS)
    expected = plain(inputs, answers, loss, options)
    set_chunk_rows(monkeypatch, rows)  # 2 rows: most answers are longer than a chunk
    assert_same(run(inputs, answers, loss, options), expected, 1e-11)


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("backend", ["triton", "triton_fused"])
@pytest.mark.parametrize("loss", [KTO, APO], ids=lambda loss: loss.name)
def test_triton_is_torch(monkeypatch, loss, backend, rows):
    inputs = make_inputs(lengths=SHORT_LENGTHS, hidden_size=16, vocab_size=50)
    answers = answers_of(inputs, weighted=rows == 2)
    expected = plain(inputs, answers, loss, options_for(inputs, "torch"))
    set_chunk_rows(monkeypatch, rows)
    monkeypatch.setattr(Singles, "terms_in_torch", None)
    assert_same(run(inputs, answers, loss, options_for(inputs, backend)), expected, 1e-11)


def test_fused_is_close_to_torch():
    inputs = make_inputs(lengths=SHORT_LENGTHS, hidden_size=32, vocab_size=64).to(torch.bfloat16)
    answers = answers_of(inputs)
    expected = plain(inputs.to(torch.float64), answers, KTO, options_for(inputs, "torch"))
    found = run(inputs, answers, KTO, options_for(inputs, "triton_fused"))
    assert_same(found, expected, 2e-2)


# Of answers of 3, 1, 8, 5, 2 and 12 rows in chunks of 2, the first long one is computed once. So is
# the last piece of the others.
@pytest.mark.parametrize(("rows", "again"), [(2, 6 + 4 + 10), (100, 0)])
@pytest.mark.parametrize("loss", [KTO, APO], ids=lambda loss: loss.name)
def test_which_logits_are_computed_again(monkeypatch, loss, rows, again):
    inputs = make_inputs()
    set_chunk_rows(monkeypatch, rows)
    scored = count_scored_rows(monkeypatch)
    run(inputs, answers_of(inputs), loss, options_for(inputs, "torch"))
    assert sum(scored) == len(inputs.labels) + again


def test_naive_is_the_same_in_fp64():
    inputs = make_inputs()
    answers = answers_of(inputs)
    found = run(inputs, answers, KTO, options_for(inputs, "naive"))
    assert_same(found, plain(inputs, answers, KTO, options_for(inputs, "torch")), 1e-12)


def test_z_has_no_gradient_and_none_is_zero():
    inputs = make_inputs()
    answers = answers_of(inputs, z=0.0)
    z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    zero = run(inputs, answers, KTO, options_for(inputs, "torch"))
    for other in (None, z):
        given = Answers(inputs.bounds, inputs.ref_logps, answers.is_desirable, other)
        assert_same(run(inputs, given, KTO, options_for(inputs, "torch")), zero, 1e-15)
    assert z.grad is None


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_without_sequences_all_is_zero(backend):
    inputs = make_inputs(lengths=())
    found = run(inputs, answers_of(inputs), KTO, options_for(inputs, backend))
    assert found["logps"].shape == (0,)
    assert found["metrics"].shape == (len(SEQUENCE_METRIC_NAMES), 0)
    assert found["loss"].item() == 0.0
    assert not found["weight"].any()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"bounds": torch.tensor([0, 3, 3, 7])}, ValueError, "sequence 1 has no scored token"),
        ({"bounds": torch.tensor([0, 3, 4, 6])}, ValueError, "bounds run from 0 to 6, expected"),
        ({"is_desirable": torch.ones(3)}, ValueError, r"is_desirable is \[3\] torch.float32"),
        ({"is_desirable": None}, TypeError, "is_desirable is a NoneType, expected a tensor"),
        ({"ref_logps": torch.ones(2)}, ValueError, r"ref_logps is \[2\]"),
        ({"z": torch.zeros(1)}, ValueError, r"z is \[1\] torch.float32, expected \[\]"),
        ({"z": 0.0}, TypeError, "z is a float, expected a tensor"),
        ({"weights": -torch.ones(3)}, ValueError, r"weights\[0\] is -1, expected .* at least 0"),
    ],
)
def test_wrong_answers_are_refused(changes, error, words):
    inputs = make_inputs(lengths=(3, 1, 3))
    answers = Answers(**{**vars(answers_of(inputs)), **changes})
    with pytest.raises(error, match=words):
        linear_sequence_loss(inputs.hidden_states, inputs.weight, inputs.labels, answers, KTO)


def test_a_loss_of_pairs_is_refused():
    inputs = make_inputs(lengths=(3, 1, 3))
    with pytest.raises(TypeError, match="loss is a SigmoidLoss, expected one from make_unpaired"):
        linear_sequence_loss(
            *(inputs.hidden_states, inputs.weight, inputs.labels, answers_of(inputs)),
            make_loss("sigmoid"),
        )
