"""The head's benchmark: inputs, truth, judgement, and the JSON that it writes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from benchmarks import REPOSITORY
from benchmarks.head import benchmark, cases_of, parse
from benchmarks.head_cases import BETA, MODELS, Case, Outputs, make_inputs, sequence_rows
from benchmarks.head_contenders import ENTRIES, contender
from benchmarks.head_truth import Judge, find_truth, naive_in_dtype

CASE = Case("tiny", 41, 24, 507, 3, "float32", even=False)


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(CASE, "cpu")


@pytest.fixture(scope="module")
def judge(inputs):
    return Judge(inputs)


def autograd_truth(inputs):
    """All results by autograd in fp64, for all pairs at once."""
    x, weight = (
        t.detach().double().requires_grad_() for t in (inputs.hidden_states, inputs.weight)
    )
    per_token_logps = (x @ weight.t()).log_softmax(-1).gather(-1, inputs.labels[:, None])[:, 0]
    logps = torch.stack([per_token_logps[rows].sum() for rows in sequence_rows(inputs.bounds)])
    logratios = logps - inputs.ref_logps
    pair_losses = -F.logsigmoid(BETA * (logratios[0::2] - logratios[1::2]))
    gradients = torch.autograd.grad(pair_losses.mean(), [x, weight])
    return per_token_logps.detach(), logps.detach(), pair_losses.detach(), *gradients


def test_the_truth_is_that_of_autograd(inputs):
    truth = find_truth(inputs)
    names = ("per_token_logps", "logps", "pair_losses", "d_hidden_states", "d_weight")
    for name, exact in zip(names, autograd_truth(inputs), strict=True):
        torch.testing.assert_close(getattr(truth, name), exact, rtol=1e-11, atol=1e-14)


def test_the_baseline_is_near_the_truth(judge, inputs):
    assert naive_in_dtype(inputs).d_weight.dtype == torch.float32
    for name, error in judge.naive_errors.items():
        assert 0.0 <= error < 1e-4, name


def test_inputs_are_the_same_in_every_process(inputs):
    targets = {"labels": inputs.labels, "ref_logps": inputs.ref_logps}
    again, given = make_inputs(CASE, "cpu"), make_inputs(CASE, "cpu", targets)
    for other in (again, given):
        for name in ("hidden_states", "weight", "labels", "bounds", "ref_hidden_states"):
            assert torch.equal(getattr(inputs, name), getattr(other, name)), name
        assert torch.equal(inputs.ref_logps, other.ref_logps)


def test_bounds_are_of_whole_pairs_and_cover_the_rows():
    for num_tokens, num_pairs, even in ((41, 3, False), (6, 3, False), (48, 3, True)):
        case = replace(CASE, num_tokens=num_tokens, num_pairs=num_pairs, even=even)
        limits = make_inputs(case, "cpu").limits
        lengths = [end - start for start, end in pairwise(limits)]
        assert (limits[0], limits[-1], len(lengths)) == (0, num_tokens, 2 * num_pairs)
        assert min(lengths) >= 1
        assert (len(set(lengths)) == 1) == (even or num_tokens == len(lengths))


def test_logits_and_logps_spread_as_a_model_s_do():
    inputs = make_inputs(Case("wide", 256, 128, 4096, 4, "float32", even=True), "cpu")
    logps = find_truth(inputs).per_token_logps
    assert 2.0 < (inputs.hidden_states @ inputs.weight.t()).std() < 3.5
    sure = (logps > -0.1).double().mean()
    unsure = (logps < -3.0).double().mean()
    assert sure > 0.15
    assert unsure > 0.15
    gaps = find_truth(inputs).logps - inputs.ref_logps
    assert 0.0 < gaps.abs().max() < 30.0


@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", ["ours_torch", "naive"])
def test_the_right_are_right(name, step, inputs, judge):
    made = contender(name, inputs, step)
    verdict = getattr(judge, step)(made.run())
    assert verdict.complaint is None
    assert set(verdict.errors) >= ({"loss", "d_weight"} if step == "forward_backward" else set())


@pytest.mark.peer
@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", ["trl", "liger_dpo"])
def test_peers_that_run_on_a_cpu_do_the_same_work(name, step, inputs, judge):
    made = contender(name, inputs, step)
    assert made.reason is None
    assert getattr(judge, step)(made.run()).complaint is None


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_a_peer_without_a_dpo_loss_is_compared_beforehand(factor, inputs, monkeypatch):
    def summed(x, weight, labels, reduction):
        assert reduction == "sum"
        return factor * F.cross_entropy(x @ weight.t(), labels, reduction=reduction)

    twin = types.ModuleType("quack.linear_cross_entropy")
    twin.chunked_linear_cross_entropy = summed
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", twin)
    monkeypatch.setattr("benchmarks.head_contenders._need_gpu", lambda _: None)
    made = contender("quack", inputs, "forward_backward")
    if factor == 1.0:
        outputs = made.run()
        assert outputs.d_weight.shape == inputs.weight.shape
        assert not made.judged
    else:
        assert made.run is None
        assert "its loss has an error of 1.0e-01" in made.reason


def test_each_wrong_part_is_found(inputs, judge):
    right = contender("naive", inputs, "forward_backward").run()
    assert judge.forward_backward(right).complaint is None
    for name in ("per_token_logps", "logps", "loss", "d_hidden_states", "d_weight"):
        wrong = replace(right, **{name: getattr(right, name) * 1.01})
        assert name in judge.forward_backward(wrong).complaint
        wrong = replace(right, **{name: getattr(right, name) * float("nan")})
        assert name in judge.forward_backward(wrong).complaint


def test_sums_in_bf16_are_timed_with_their_errors_and_mistakes_are_not(inputs, judge):
    """Cut Cross-Entropy sums d_hidden_states over the vocabulary in bf16."""
    right = contender("naive", inputs, "forward_backward").run()
    d_hidden_states, weight = right.d_hidden_states, inputs.weight.detach()
    logits = inputs.hidden_states.detach() @ weight.t()
    d_logits = -logits.softmax(-1).scatter_add_(
        -1, inputs.labels[:, None], -torch.ones(len(logits), 1)
    )
    coefficients = (d_hidden_states * (d_logits @ weight)).sum(-1)
    coefficients /= (d_logits @ weight).square().sum(-1)
    summed = torch.zeros_like(d_hidden_states, dtype=torch.bfloat16)
    for token in range(len(weight)):
        part = (coefficients * d_logits[:, token])[:, None] * weight[token]
        summed += part.bfloat16()
    rough = replace(right, d_hidden_states=summed)
    allowed = ENTRIES["cce_exact"].gradient_error
    assert "d_hidden_states" in judge.forward_backward(rough).complaint
    assert judge.forward_backward(rough, allowed).complaint is None
    assert {name for name, entry in ENTRIES.items() if entry.gradient_error} == {
        "cce_exact",
        "cce_filtered",
    }
    for factor in (-1.0, 0.5, 2.0):
        wrong = replace(right, d_hidden_states=right.d_hidden_states * factor)
        assert "d_hidden_states" in judge.forward_backward(wrong, allowed).complaint


def test_a_result_that_lacks_a_part_is_refused(inputs, judge):
    right = contender("naive", inputs, "forward_backward").run()
    with pytest.raises(ValueError, match="lacks d_weight"):
        judge.forward_backward(replace(right, d_weight=None))
    with pytest.raises(ValueError, match="lacks log-probs"):
        judge.forward(Outputs())


def test_peers_without_a_gpu_say_so(inputs):
    for name in ("liger_flce", "cce_exact", "cce_filtered"):
        assert contender(name, inputs, "forward").reason == "its Triton kernels need a GPU"
    assert "bf16" in contender("floor_fp32", inputs, "forward").reason


@pytest.mark.parametrize("step", ["forward", "forward_backward"])
def test_the_floor_takes_no_memory_from_others(step, inputs):
    def all_logits():
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        return sum(each.shape == (41, 507) for each in tensors)

    made = contender("floor", inputs, step)
    assert all_logits() == 0
    with made.holding():
        assert all_logits() == 1
        made.run()
    assert all_logits() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "argument --device: there is no CUDA or ROCm device"),
        (["--tokens", "0"], "argument --tokens: '0' is no whole number above 0"),
        (["--rounds", "-1"], "argument --rounds: '-1' is no whole number above 0"),
        (["--tokens", "9", "--pairs", "5"], "9 tokens are too few for 5 pairs"),
        (["--tokens", "2"], "2 tokens are too few for 8 pairs"),
    ],
)
def test_misuse_is_one_sentence(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_default_cases(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (case,) = cases_of(parse(["--device", "cpu"]))
    assert case == Case("qwen2.5-0.5b", 1024, 896, 151936, 8, "float32", even=True)
    cases = cases_of(parse(["--device", "cuda"]))
    assert {each.model for each in cases} == set(MODELS)
    assert {each.num_tokens for each in cases} == {4096, 8192, 16384, 32768}
    assert {each.dtype for each in cases} == {"bfloat16"}
    picked = parse(["--device", "cuda", "--shapes", "mistral-7b", "--tokens", "8192"])
    assert cases_of(picked) == [Case("mistral-7b", 8192, 4096, 32768, 16, "bfloat16", even=False)]


SMALL = ["--device", "cpu", "--tokens", "32", "--hidden", "16", "--vocab", "307", "--pairs", "2"]
SMALL += ["--rounds", "2", "--contenders", "naive", "floor", "--threads", "1"]


def test_what_is_written(tmp_path, capsys):
    file = tmp_path / "results" / "head.json"
    assert benchmark(parse([*SMALL, "--no-memory", "--json", str(file)])) == 0
    given = json.loads(file.read_text())
    assert (given["benchmark"], given["ours"]) == ("head", "ours_torch")
    assert {"floor_time", "naive_time", "trl_time", "naive_forward_time"} <= set(given["ratios"])
    assert given["ratios"]["naive_time"] > 0.0
    assert given["ratios"]["trl_time"] is None
    assert given["ratio_reasons"]["trl_time"] == "trl: left out by the command line"
    (case,) = given["cases"]
    assert (case["N"], case["H"], case["V"], case["pairs"]) == (32, 16, 307, 2)
    ours, naive = (case["forward_backward"][name] for name in ("ours_torch", "naive"))
    assert given["ratios"]["naive_time"] == ours["median"] / naive["median"]
    assert (ours["status"], ours["rounds"], len(ours["seconds"])) == ("timed", 2, 2)
    assert set(ours["errors"]) == {"logps", "loss", "d_hidden_states", "d_weight"}
    assert set(case["error_bounds"]) == {"per_token_logps", *ours["errors"]}
    assert set(given["stamps"]) == {"date", "command", "git", "hardware", "versions"}
    assert "forward + backward" in capsys.readouterr().out


def test_a_peer_that_raises_is_no_failure_but_ours_is(monkeypatch, tmp_path):
    def broken(inputs):
        raise RuntimeError("out of order")

    file = tmp_path / "head.json"
    options = parse([*SMALL, "--no-memory", "--json", str(file)])
    monkeypatch.setitem(ENTRIES, "naive", replace(ENTRIES["naive"], make=broken))
    assert benchmark(options) == 0
    assert json.loads(file.read_text())["ratios"]["naive_time"] is None
    monkeypatch.setitem(ENTRIES, "ours_torch", replace(ENTRIES["ours_torch"], make=broken))
    assert benchmark(options) == 1
    why = json.loads(file.read_text())["ratio_reasons"]["floor_time"]
    assert why == "ours_torch: RuntimeError: out of order"


def test_a_case_out_of_memory_is_reported(monkeypatch, tmp_path):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("tried to allocate")

    file = tmp_path / "head.json"
    monkeypatch.setattr("benchmarks.head.make_inputs", out_of_memory)
    assert benchmark(parse([*SMALL, "--json", str(file)])) == 1
    (case,) = json.loads(file.read_text())["cases"]
    assert case["reason"] == "OutOfMemoryError: tried to allocate"


@pytest.mark.slow  # starts several processes
def test_a_dry_run_measures_everything_and_exits_0(tmp_path):
    file = tmp_path / "head.json"
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    command = [sys.executable, "-m", "benchmarks.head", "--dry-run", "--json", str(file)]
    ended = subprocess.run(
        [*command, "--contenders", "naive", "floor"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    given = json.loads(file.read_text())
    assert given["dry_run"] is True
    memory = given["cases"][0]["memory"]
    peaks = memory["ours_torch"]
    assert peaks["beyond_inputs"] > 0
    gradients, fp32_d_weight = 2 * 64 * (96 + 1003), 4 * 64 * 1003
    assert (peaks["gradients"], peaks["fp32_d_weight"]) == (gradients, fp32_d_weight)
    beyond = peaks["beyond_inputs_gradients_and_fp32_d_weight"]
    assert beyond == peaks["beyond_inputs"] - gradients - fp32_d_weight
    assert memory["trl"] == {"reason": "left out by the command line"}
    assert "naive_memory" in given["ratios"]
    assert "memory" in ended.stdout
