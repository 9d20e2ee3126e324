"""The race of whole steps: all train the same, wrong results get no speed, JSON is written."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import takewhile

import pytest

from benchmarks import program, train
from benchmarks.harness import ABSENT, FAILED, TIMED, WRONG
from benchmarks.rounds import TRIAL_STEPS, Race
from benchmarks.train import PAIRS, benchmark, case_of, parse, planned_counts, program_of
from benchmarks.train_cases import Case, Work, gpu_case, prepare, race_case, tiny
from benchmarks.train_child import run
from benchmarks.train_contenders import OF_HYBRIDS, OF_PAIRS
from tests.racing import Children, compare

CASE = tiny(race_case())
BATCH = CASE.fixed_batch
TRL = ("trl", "trl_compact", "trl_plain")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    prepare(CASE, folder, None)
    return Work(folder, "cpu", BATCH, CASE.steps)


@pytest.fixture(scope="module")
def truth(work):
    return run("naive", work)


@pytest.fixture
def stock_trl(monkeypatch):
    """Undo the changes that contenders make to TRL in their own process."""
    utils = pytest.importorskip("trl.trainer.utils")
    for name in ("_use_triton", "_ChunkedLogProbFunction"):
        monkeypatch.setattr(utils, name, getattr(utils, name))


def timed_pairs(work):
    """(prompt, chosen, rejected) ids of the timed pairs."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [[pair[name] for name in names] for pair in work.pairs][CASE.pairs_per_step :]


def padded_tokens(work):
    """Tokens with padding, in micro-batches of BATCH pairs."""
    longest = [len(p) + max(len(c), len(r)) for p, c, r in timed_pairs(work)]
    starts = range(0, len(longest), BATCH)
    return sum(2 * BATCH * max(longest[start : start + BATCH]) for start in starts)


def unshared_tokens(work):
    return sum(2 * len(p) + len(c) + len(r) for p, c, r in timed_pairs(work))


def shared_tokens(work):
    both = [zip(p + c, p + r, strict=False) for p, c, r in timed_pairs(work)]
    shared = [list(takewhile(lambda ids: ids[0] == ids[1], pair)) for pair in both]
    return unshared_tokens(work) - sum(map(len, shared))


def answer_tokens(work):
    return sum(len(c) + len(r) for _, c, r in timed_pairs(work))


def test_naive_is_dpo_that_trains_and_is_counted(work, truth):
    assert truth["losses"][0] == pytest.approx(0.6931471805599453, abs=1e-12)
    assert truth["losses"][1] < truth["losses"][0]  # the same pairs, after a step
    assert len(truth["losses"]) == len(truth["grad_norms"]) == 1 + CASE.steps
    assert truth["seconds"] > 0.0
    tokens = 2 * padded_tokens(work)  # two models
    assert truth["counts"] == {"body_tokens": tokens, "head_rows": tokens}


@pytest.mark.parametrize(
    ("layout", "body_tokens"),
    [("shared", shared_tokens), ("unshared", unshared_tokens), ("padded", padded_tokens)],
)
def test_ours_trains_the_same_on_what_was_planned(layout, body_tokens, work, truth):
    found = run(layout, work)
    compare(found, truth, CASE)
    expected = {"body_tokens": body_tokens(work), "head_rows": answer_tokens(work)}
    assert found["counts"] == planned_counts(work, layout) == expected
    assert found["attention"] == "sdpa"


@pytest.mark.peer
@pytest.mark.parametrize("name", TRL)
def test_trl_trains_the_same(name, work, truth, stock_trl):
    found = run(name, work)
    compare(found, truth, CASE)
    models = 2 if name == "trl_plain" else 1
    assert found["counts"]["body_tokens"] == models * padded_tokens(work)
    rows = found["counts"]["head_rows"]
    if name == "trl_compact":
        assert rows == answer_tokens(work)
    else:  # every token except the last of each sequence
        num_sequences = models * 2 * CASE.steps * CASE.pairs_per_step
        assert rows == models * padded_tokens(work) - num_sequences


@pytest.mark.slow
def test_layouts_of_a_hybrid_train_the_same_on_what_was_planned(tmp_path):
    case = tiny(race_case("hybrid"))
    prepare(case, tmp_path, None)
    work = Work(tmp_path, "cpu", BATCH, case.steps)
    truth = run("naive", work)
    for name in ("shared", "padded"):
        found = run(name, work)
        compare(found, truth, case)
        assert found["counts"] == planned_counts(work, name)


@pytest.mark.parametrize("name", ["shared", "naive"])
def test_fewer_steps_can_be_run(name, work, truth):
    found = run(name, replace(work, num_steps=1))
    assert found["losses"] == pytest.approx(truth["losses"][:2], rel=1e-5)


@pytest.mark.parametrize("name", ["shared", "padded", "naive"])
def test_adapters_and_checkpointing_in_bf16_as_on_a_gpu(name, tmp_path):
    pytest.importorskip("peft", reason="needs the extra `peft`")
    case = replace(tiny(gpu_case("0.5b", (1, 2))), lora=True, learning_rate=1e-3)
    prepare(case, tmp_path, None)
    found = run(name, Work(tmp_path, "cpu", BATCH, case.steps))
    assert "reason" not in found
    assert found["losses"][0] == pytest.approx(0.6931471805599453, abs=1e-2)


def raced(children, rounds=2, case=CASE):
    race = Race(PAIRS.contest, case, children, {})
    race.choose_batches()
    for number in range(rounds):
        race.run_round(number)
    return race


def test_rounds_are_interleaved_and_the_best_batch_size_is_found_before():
    children = Children()
    race = raced(children)
    trials = [("trl", 1), ("trl", 2), ("trl_compact", 1), ("trl_compact", 2)]
    assert children.calls[:4] == [(*trial, TRIAL_STEPS) for trial in trials]
    assert [race.standings[name].batch_size for name in OF_PAIRS] == [2, 2, 2, 1, 1, 2, 2]
    names = list(OF_PAIRS)
    rounds = [call[0] for call in children.calls[4:]]
    assert rounds == [*names, *names[1:], names[0]]
    assert all(steps == CASE.steps for _, _, steps in children.calls[4:])
    ratios, why = race.ratios()
    assert ratios["naive_speed"] == 8.0
    assert ratios["trl_speed"] == 2.0  # at its best batch size
    assert ratios["naive_memory"] == 0.5
    assert not why


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"losses": [0.7, 0.7, 0.70008]}, "loss 1.14e-04"),
        ({"losses": [0.7, float("nan"), 0.7]}, "loss nan"),
        ({"grad_norms": [2.0, 2.1, 2.0]}, "grad_norm 5.00e-02"),
    ],
)
def test_a_wrong_contender_gets_no_speed_and_runs_no_more(change, what):
    children = Children(trl=change)
    race = raced(children)
    standing = race.standings["trl"]
    assert standing.result.status == WRONG
    assert what in standing.result.reason
    assert (standing.speed, standing.peak, standing.result.seconds) == (None, None, [])
    assert [name for name, _, steps in children.calls if steps > 1].count("trl") == 1
    ratios, why = race.ratios()
    assert ratios["trl_speed"] is ratios["trl_memory"] is None
    assert why["trl_speed"] == f"trl: {standing.result.reason}"
    assert ratios["padded_speed"] == 4.0


def test_one_that_fails_says_why():
    reasons = {
        "trl": {"status": ABSENT, "reason": "ModuleNotFoundError: No module named 'trl'"},
        "padded": {"status": FAILED, "reason": "ended by SIGKILL"},
    }
    children = Children(**reasons)
    race = raced(children)
    for name, given in reasons.items():
        result = race.standings[name].result
        assert (result.status, result.reason) == (given["status"], given["reason"])
        assert race.standings[name].as_dict()["median"] is None
        assert [call[0] for call in children.calls].count(name) == 1
    assert race.ratios()[1]["padded_memory"] == "padded: ended by SIGKILL"


def test_a_batch_size_that_fails_is_not_taken():
    class OutOfMemory(Children):
        def __call__(self, name, batch_size, steps):
            if batch_size == 1:
                return {"status": FAILED, "reason": "OutOfMemoryError: tried to allocate"}
            return super().__call__(name, batch_size, steps)

    standing = raced(OutOfMemory()).standings["trl"]
    assert standing.batch_size == 2
    assert standing.tried == {1: "OutOfMemoryError: tried to allocate", 2: 2.0}
    assert standing.speed == 2.0


def test_without_the_right_losses_nobody_gets_a_speed():
    race = raced(Children(naive={"status": FAILED, "reason": "ended by SIGKILL"}))
    assert race.standings["shared"].result.reason == "no results of naive to compare with"
    assert not race.running


def write(monkeypatch, tmp_path, children, *arguments):
    """Run the command line with these children: exit code and JSON."""
    file = tmp_path / "results" / "train.json"
    monkeypatch.setattr(program, "child_runner", lambda *_: children)
    planned = {"body_tokens": 10, "head_rows": 5}
    monkeypatch.setattr(train, "planned_counts", lambda *_: planned)
    monkeypatch.setattr(train, "tiny", lambda case: replace(CASE, batch_sizes=case.batch_sizes))
    code = benchmark(parse(["--device", "cpu", "--dry-run", "--json", str(file), *arguments]))
    return code, json.loads(file.read_text())


def test_what_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(program, "has_targets", lambda _: True)
    code, given = write(monkeypatch, tmp_path, Children(), "--rounds", "2", "--skip", "unshared")
    assert code == 0
    assert (given["benchmark"], given["ours"]) == ("train", "shared")
    names = ("padded_speed", "trl_speed", "trl_compact_speed", "naive_speed")
    assert {*names, "trl_memory", "naive_memory"} <= set(given["ratios"])
    assert given["ratio_reasons"]["unshared_speed"] == "unshared: left out by the command line"
    assert given["ratio_reasons"]["trl_plain_speed"].startswith("trl_plain: left out on cpu")
    assert given["counts"]["naive"] == {"body_tokens": 10, "head_rows": 5}
    assert given["counts"]["unshared"] is None
    assert set(given["planned_counts"]) == {"shared", "padded"}
    assert given["max_tokens_per_microbatch"] == given["case"]["max_tokens"] == CASE.max_tokens
    assert given["targets"]["naive_speed"]["holds"] is True  # 8 of 6
    assert given["targets"]["trl_speed"]["holds"] is False  # 2 of 3.5
    assert given["targets"]["naive_memory"]["holds"] is False  # 0.5, at most 0.25
    trl = given["contenders"]["trl"]
    assert (trl["batch_size"], trl["rounds"], trl["status"]) == (1, 2, "timed")
    assert trl["pairs_per_second"] == 8 / trl["median"]
    assert set(given["stamps"]) == {"date", "command", "git", "hardware", "versions"}
    shown = capsys.readouterr().out
    assert "trl_speed 2.00, at least 3.5: is missed" in shown
    assert "naive_speed 8.00, at least 6.0: holds" in shown


@pytest.mark.parametrize(
    "children",
    [
        Children(shared={"losses": [0.7, 0.7, 0.9]}),
        Children(shared={"status": FAILED, "reason": "RuntimeError: out of order"}),
        Children(shared={"counts": {"body_tokens": 11, "head_rows": 5}}),
        Children(padded={"counts": {"body_tokens": 10, "head_rows": 6}}),
    ],
    ids=["wrong", "failed", "miscounted", "another layout miscounted"],
)
def test_what_ends_with_exit_code_1(children, monkeypatch, tmp_path):
    code, given = write(monkeypatch, tmp_path, children)
    assert code == 1
    assert given["targets"] is None  # a dry run has none
    assert bool(given["miscounts"]) == ("counts" in str(children.changes))


def test_rivals_that_fail_or_err_end_with_exit_code_0(monkeypatch, tmp_path):
    rivals = Children(trl={"losses": [9.0] * 3}, padded={"status": FAILED, "reason": "no"})
    assert write(monkeypatch, tmp_path, rivals)[0] == 0


def test_the_race_on_a_cpu_is_the_one_that_is_described():
    case = case_of(parse(["--device", "cpu"]))
    sizes = (1, 2, 4, 8)
    assert case == Case("race", batch_sizes={"trl": sizes, "trl_compact": sizes})
    config = case.config(16_000, 0)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (4, 256, 688)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert (case.dtype, case.steps, case.pairs_per_step, case.max_length) == ("float32", 4, 8, 4096)
    assert (case.max_tokens, case.fixed_batch, case.checkpointing) == (2048, 4, False)


def test_the_race_of_a_hybrid():
    options = parse(["--device", "cpu", "--shape", "hybrid"])
    found, case = program_of(options), case_of(options)
    assert (found.contest.ours, [*found.contest.entries]) == ("shared", [*OF_HYBRIDS])
    assert (found.at_least, found.at_most) == ({"padded_speed": 1.3}, {})
    assert case == replace(case_of(parse(["--device", "cpu"])), shape="hybrid")
    config = case.config(16_000, 0)
    assert config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert not program_of(parse(["--shape", "hybrid", "--answers", "4"])).at_least


def test_shapes_for_a_gpu():
    given = [
        "--device",
        "cuda",
        "--shape",
        "7b",
        "--lora",
        "--layers",
        "4",
        "--batch-sizes",
        "3",
        "4",
    ]
    case = case_of(parse(given))
    assert (case.shape, case.lora, case.layers, case.dtype) == ("7b", True, 4, "bfloat16")
    assert case.checkpointing
    assert case.batches_of("trl") == case.batches_of("naive") == (4,)  # 3 doesn't divide a step
    config = case.config(16_000, 0)
    assert (config.vocab_size, config.num_hidden_layers) == (152064, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device cuda --batch-sizes 3", "32 pairs can't be made of micro-batches of 3"),
        ("--device cpu --layers 2", "--layers needs --device cuda"),
        ("--device cpu --shape 7b", "--shape 7b needs --device cuda; a CPU can race hybrid"),
        ("--device cpu --shape hybrid --skip trl", "trl takes no part in a race with hybrid"),
    ],
)
def test_what_cannot_be_raced_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.slow  # starts several processes
def test_a_dry_run_in_processes_of_their_own(tmp_path):
    """Peaks are those of the children: ru_maxrss would start with the peak of this process."""
    file, held = tmp_path / "train.json", bytearray(b"\1") * 2**30
    assert (
        benchmark(
            parse(["--dry-run", "--contenders", "shared", "--threads", "1", "--json", str(file)])
        )
        == 0
    )
    given = json.loads(file.read_text())
    assert given["ratios"]["naive_speed"] > 0.0
    assert given["counts"]["shared"] == given["planned_counts"]["shared"]
    for name in ("shared", "naive"):
        assert 10**8 < given["contenders"][name]["peak_bytes"] < len(held)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--device", "cuda"]])
def test_a_dry_run_with_everyone(arguments, tmp_path):
    file = tmp_path / "train.json"
    assert benchmark(parse([*arguments, "--dry-run", "--json", str(file)])) == 0
    contenders = json.loads(file.read_text())["contenders"]
    absent = {"cpu": {"trl_plain"}, "cuda": {"trl_compact"}}[arguments[1]]
    assert {name for name in contenders if contenders[name]["status"] == ABSENT} == absent
    assert {contenders[name]["status"] for name in contenders.keys() - absent} == {TIMED}
