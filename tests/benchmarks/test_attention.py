"""The attention benchmark: packed rows, truth, judgement, and the JSON that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

from benchmarks.attention import benchmark, cases_of, parse, peaks, run_case
from benchmarks.attention_cases import (
    DATA,
    KINDS,
    MODELS,
    Case,
    Heads,
    fill_row,
    make_inputs,
    pair_groups,
)
from benchmarks.attention_contenders import ENTRIES, contender, sequence_tokens
from benchmarks.attention_truth import Judge, find_truth
from benchmarks.data import REPOSITORY
from dpofast_kernels.attention import attends, dispatch
from dpofast_kernels.attention.backends import Machine
from tests.kernels.attention import cases as reference
from tests.kernels.attention import emulated

PASSES = ("forward", "forward_backward")
TOKENS = 200


@pytest.fixture(autouse=True)
def small_heads(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", Heads(4, 2, 16))


def case_of(kind="plain", data="instruction_preference", dtype="float32"):
    return Case("tiny", data, TOKENS, kind, dtype)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("data", DATA)
def test_rows_are_made_of_real_pairs(data):
    groups = pair_groups(data)
    assert len(groups) > 250
    assert all(prefix >= 1 and min(rests) >= 0 and max(rests) >= 1 for prefix, rests in groups)
    assert max(prefix + max(rests) for prefix, rests in groups) <= 1024
    for max_tokens in (400, 2048, 32768):
        row = fill_row(groups, max_tokens)
        assert 0.8 * max_tokens < sum(prefix + sum(rests) for prefix, rests in row) <= max_tokens
    with pytest.raises(ValueError, match="no pair fits into a row of 5 tokens"):
        fill_row(groups, 5)


def test_answers_that_begin_alike_share_more_than_the_prompt():
    groups = pair_groups("instruction_preference")
    prompts, common, answers = 20_262, 3_384, 33_746  # tokens, as counted in the file
    assert sum(prefix for prefix, _ in groups) == prompts + common
    assert sum(sum(rests) for _, rests in groups) == answers - 2 * common


def test_operations_are_those_of_scores_that_are_not_masked(kind):
    case = case_of(kind)
    layout = make_inputs(case, "cpu").layout
    seen = int(attends(layout, KINDS[kind].get("window")).sum())
    assert case.flop("forward") == 2 * 2 * 16 * 4 * seen
    assert case.flop("forward_backward") == 3.5 * case.flop("forward")


def test_inputs_are_the_same_in_every_process():
    first, again = (make_inputs(case_of("sinks"), "cpu") for _ in range(2))
    for name in ("query", "key", "value", "sinks", "d_output"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", ["plain", "window"])
def test_the_truth_is_that_of_every_sequence_alone(kind, data):
    inputs = make_inputs(replace(case_of(kind, data), max_tokens=400), "cpu")
    names = ("query", "key", "value", "sinks", "d_output")
    doubles = [None if (t := getattr(inputs, n)) is None else t.detach().double() for n in names]
    alone = reference.run_alone(
        reference.Inputs(inputs.layout, *doubles), inputs.groups, inputs.options.window
    )
    truth = find_truth(inputs)
    for name, given in (("output", truth.output), ("query", truth.d_query)):
        torch.testing.assert_close(given, alone[name], rtol=1e-10, atol=1e-12)
    for name in ("key", "value"):
        given = getattr(truth, f"d_{name}")
        torch.testing.assert_close(given, alone[name], rtol=1e-10, atol=1e-12)


def test_sequences_are_found_in_the_row():
    groups = [(2, (3, 1)), (4, (0, 2))]
    tokens = [each.tolist() for each in sequence_tokens(groups)]
    assert tokens == [[0, 1, 2, 3, 4], [0, 1, 5], [6, 7, 8, 9], [6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_who_run_on_a_cpu_are_right(kind, dtype):
    inputs = make_inputs(case_of(kind, dtype=dtype), "cpu")
    judge = Judge(inputs)
    absent = {}
    for name in ENTRIES:
        for step in PASSES:
            made = contender(name, inputs, step)
            if made.run is None:
                absent[name] = made.reason
                continue
            verdict = getattr(judge, step)(made.run())
            assert verdict.complaint is None, (name, step)
            wanted = {"output"} if step == "forward" else set(judge.naive_errors)
            assert set(verdict.errors) == wanted
    running = {"ours_plain", "unshared"}
    running |= {"ours_sdpa"} if kind in ("plain", "window") else set()
    running |= {"padded"} if kind == "plain" else set()
    assert set(ENTRIES) - set(absent) == running
    assert absent["varlen_alone"] == "it runs on CUDA alone, not on cpu"


def test_a_single_pair_that_is_wrong_is_found():
    """The bounds hold for each pair of the row, so a mistake in one can't hide in the others."""
    inputs = make_inputs(case_of("sinks"), "cpu")
    judge = Judge(inputs)
    right = contender("ours_plain", inputs, "forward_backward").run()
    assert judge.forward_backward(right).complaint is None
    last = inputs.layout.group_ids == inputs.layout.group_ids[-1]
    for name in ("output", "d_query", "d_key", "d_value"):
        for factor in (1.001, float("nan")):
            changed = getattr(right, name).clone()
            changed[last] *= factor
            assert name in judge.forward_backward(replace(right, **{name: changed})).complaint
    wrong = replace(right, d_sinks=right.d_sinks * 1.001)
    assert "d_sinks" in judge.forward_backward(wrong).complaint


def test_copies_that_differ_are_found():
    """Each copy of a token must have its output; the copies' gradients are added up."""
    inputs = make_inputs(case_of(), "cpu")
    judge = Judge(inputs)
    right = contender("unshared", inputs, "forward_backward").run()
    second = len(next(sequence_tokens(inputs.groups)))  # where the second sequence begins
    for name in ("output", "d_key"):
        changed = getattr(right, name).clone()
        changed[second : second + 4] *= 1.01
        assert name in judge.forward_backward(replace(right, **{name: changed})).complaint


def test_a_result_that_lacks_a_part_is_refused():
    inputs = make_inputs(case_of(), "cpu")
    right = contender("ours_sdpa", inputs, "forward").run()
    with pytest.raises(ValueError, match="lacks d_query, d_key, d_value"):
        Judge(inputs).forward_backward(right)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to be a GPU: emulate the kernels of CUDA's back ends and let them be chosen."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", emulated.operator_forward)
    library.impl("_flash_attention_backward", emulated.operator_backward)
    for name in ("flash_attn", "flash_attn_interface"):
        module = types.ModuleType(name)
        module.flash_attn_varlen_func = emulated.package_function
        monkeypatch.setitem(sys.modules, name, module)
    packages = frozenset(("flash_attn", "flash_attn_interface"))
    machine = Machine("cuda", capability=(9, 0), packages=packages)
    for module in ("benchmarks.attention_contenders", dispatch.__name__):
        monkeypatch.setattr(f"{module}.machine_of", lambda device: machine)
    yield
    library._destroy()


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_contenders_of_a_gpu_do_the_same_work(gpu, kind):
    options = parse(["--device", "cpu", "--rounds", "1", "--skip", "ours_flex"])
    run = run_case(case_of(kind, dtype="bfloat16"), options)
    assert run.ours == "ours_flash3"
    for step in PASSES:
        status = {name: (each.status, each.reason) for name, each in run.results[step].items()}
        for name in ("ours_flash3", "ours_varlen", "ours_flash_attn", "unshared", "varlen_alone"):
            assert status[name] == ("timed", None), name
        assert run.as_dict()["gather_costs"][step] > 0.0
    assert run.is_good


def test_the_default_of_a_gpu_has_no_softcap_in_varlen_attention(gpu):
    inputs = make_inputs(case_of("softcap", dtype="bfloat16"), "cpu")
    assert contender("varlen_alone", inputs, "forward").reason == "it knows no softcap"
    judge = Judge(inputs)
    made = contender("ours_flash_attn", inputs, "forward_backward")
    assert judge.forward_backward(made.run()).complaint is None


def test_default_cases(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sides = ("window", "softcap", "sinks")
    assert cases_of(parse(["--device", "cpu"])) == [
        Case("qwen2.5-0.5b", *row, "float32")
        for row in (
            ("dpo_en_demo", 2048, "plain"),
            ("instruction_preference", 512, "plain"),
            *(("dpo_en_demo", 512, kind) for kind in sides),
        )
    ]
    cases = cases_of(parse(["--device", "cuda"]))
    assert {each.dtype for each in cases} == {"bfloat16"}
    lengths = {(each.model, each.max_tokens) for each in cases if each.data == "dpo_en_demo"}
    assert {tokens for _, tokens in lengths} == {2048, 4096, 8192, 16384, 32768}
    assert {(each.model, each.kind) for each in cases if each.kind != "plain"} == {
        ("tiny", kind) for kind in sides
    }
    dry = cases_of(parse(["--device", "cuda", "--dry-run"]))
    assert {each.model for each in dry} == set(MODELS)
    assert {each.kind for each in dry} == set(KINDS)
    assert max(each.max_tokens for each in dry) <= 128


def test_what_cannot_be_run_is_said_in_a_sentence(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["--device", "cpu", "--tokens", "9"])
    assert "no pair fits into a row of 9 tokens" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        parse(["--device", "cuda"])
    assert "--device: there is no CUDA or ROCm device" in capsys.readouterr().err


SMALL = ["--device", "cpu", "--models", "tiny", "--tokens", str(TOKENS), "--side-tokens", "160"]
SMALL += ["--rounds", "2", "--threads", "1"]


def test_what_is_written(tmp_path, capsys):
    file = tmp_path / "results" / "attention.json"
    assert benchmark(parse([*SMALL, "--no-memory", "--json", str(file)])) == 0
    given = json.loads(file.read_text())
    assert (given["benchmark"], given["ours"]) == ("attention", "ours_sdpa")
    assert {"padded_time", "unshared_time", "ours_plain_forward_time"} <= set(given["ratios"])
    assert given["ratios"]["padded_time"] > 0.0
    assert given["ratios"]["ours_varlen_time"] is None
    assert [case["kind"] for case in given["cases"]] == ["plain", *KINDS]
    assert [case["ours"] for case in given["cases"][-2:]] == ["ours_plain", "ours_plain"]
    case = given["cases"][0]
    assert case["T"] < case["T_unshared"] < 2 * case["T"]
    assert case["gather_costs"] == {"forward": None, "forward_backward": None}
    ours = case["forward_backward"]["ours_sdpa"]
    assert (ours["status"], ours["rounds"]) == ("timed", 2)
    assert set(ours["errors"]) == set(case["error_bounds"]) == set(case["naive_errors"])
    assert set(given["stamps"]) == {"date", "command", "git", "hardware", "versions"}
    assert "sinks, float32: forward + backward" in capsys.readouterr().out


def test_a_contender_that_raises_is_no_failure_but_ours_is(monkeypatch, tmp_path):
    def broken(inputs):
        raise RuntimeError("out of order")

    options = parse([*SMALL, "--no-memory", "--kinds", "plain"])
    monkeypatch.setitem(ENTRIES, "padded", replace(ENTRIES["padded"], make=broken))
    assert benchmark(options) == 0
    monkeypatch.setitem(ENTRIES, "ours_sdpa", replace(ENTRIES["ours_sdpa"], make=broken))
    assert benchmark(options) == 1


def test_ours_that_is_wrong_is_a_failure(monkeypatch):
    """Rejected answers see the chosen ones here."""

    def leaking(call):
        layout = replace(call.layout, tail_ids=call.layout.tail_ids.clamp(max=1))
        return dispatch.naive_attention(replace(call, layout=layout))

    monkeypatch.setitem(dispatch.ATTENTIONS, "sdpa", leaking)
    assert benchmark(parse([*SMALL, "--no-memory", "--kinds", "plain"])) == 1


def test_memory_of_a_contender():
    found = peaks("unshared", case_of(), "cpu")
    inputs = make_inputs(case_of(), "cpu")
    assert found["gradients"] > sum(t.nbytes for t in (inputs.query, inputs.key, inputs.value))
    assert found["beyond_inputs_and_gradients"] == found["beyond_inputs"] - found["gradients"]
    assert peaks("ours_varlen", case_of(), "cpu") == {"reason": "it runs on CUDA alone, not on cpu"}


@pytest.mark.slow  # starts several processes
def test_a_dry_run_measures_everything_and_exits_0(tmp_path):
    file = tmp_path / "attention.json"
    command = [sys.executable, "-m", "benchmarks.attention", "--device", "cuda", "--dry-run"]
    command += ["--models", "qwen2.5-0.5b", "--contenders", "padded", "--json", str(file)]
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    ended = subprocess.run(
        [*command, "--kinds", "plain"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    given = json.loads(file.read_text())
    assert given["dry_run"] is True
    assert [case["ours"] for case in given["cases"]] == ["ours_sdpa", "ours_sdpa"]
    for case in given["cases"]:
        assert case["memory"]["ours_sdpa"]["gradients"] > 0
    assert "padded_memory" in given["ratios"]
    assert "memory" in ended.stdout
