"""The model of the head and of a step: its arithmetic, its plans and what it writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks import REPOSITORY
from benchmarks.model.__main__ import main
from benchmarks.model.assumptions import CARDS, ranges, sources
from benchmarks.model.head import (
    CAPPED,
    FORMER_A,
    FORMER_B,
    HEADS,
    PARTS,
    TODAY,
    Design,
    Size,
    floor_seconds,
    predict,
)
from benchmarks.model.measured import read_measured
from benchmarks.model.plans import Plan, former_plan
from benchmarks.model.predictions import (
    TOKENS,
    answer_lengths,
    capped_over_floor,
    head_cases,
    sensitivity,
)
from benchmarks.model.step import predict_body
from benchmarks.report import read_figures

H200 = CARDS["h200"]
# Before the benchmark's clock let the host run ahead of the device.
BEFORE = replace(H200, host_lead=100e-6)
# Computed independently for N = 8192, with these assumptions: milliseconds of the bare products and
# of the former way with fp32 logits, and times over the bare products of that way, of the former
# way in tiles, and of the lean one with two chunks of 4096 rows and with one chunk.
PUBLISHED = {
    "qwen2.5-0.5b": (9.4, 15.6, 1.66, 1.25, 1.07, 1.03),
    "llama-3.2-1b": (17.5, 23.9, 1.37, 1.21, 1.08, 1.03),
    "gemma-2-2b": (38.9, 59.4, 1.53, 1.24, 1.07, 1.02),
    "llama-3-8b": (34.3, 43.7, 1.27, 1.19, 1.08, 1.03),
    "qwen2.5-7b": (35.6, 47.4, 1.33, 1.18, 1.07, 1.03),
}


def even(count: int) -> Design:
    """Today's design with chunks of exactly equal size, which real pairs hardly allow."""
    return replace(TODAY, plan=lambda n, _: Plan((sum(n) // count,) * count, count == 1))


@pytest.mark.parametrize("name", HEADS)
def test_the_published_figures(name):
    size, rows = HEADS[name], answer_lengths(8192)
    floor = floor_seconds(8192, size, BEFORE)
    found = [predict(each, size, rows, BEFORE).total for each in (FORMER_A, FORMER_B)]
    found += [predict(even(count), size, rows, BEFORE).total for count in (2, 1)]
    floor_ms, former_ms, *ratios = PUBLISHED[name]
    assert 1e3 * floor == pytest.approx(floor_ms, rel=0.01)
    assert 1e3 * found[0] == pytest.approx(former_ms, rel=0.01)
    assert [each / floor for each in found] == pytest.approx(ratios, abs=0.03)


def test_the_published_parts():
    """Milliseconds of each part, for two heads."""
    published = {
        "qwen2.5-0.5b": (3.74, 3.43, 3.41, 3.99, 0.31, 0.70),
        "gemma-2-2b": (13.8, 5.8, 14.8, 21.6, 0.5, 3.0),
    }
    for name, parts in published.items():
        found = predict(FORMER_A, HEADS[name], answer_lengths(8192), BEFORE).seconds
        assert [1e3 * found[part] for part in PARTS] == pytest.approx(parts, rel=0.02, abs=0.02)


def test_the_worst_ratio_says_what_it_rests_on(tmp_path, capsys):
    file = tmp_path / "model.json"
    assert main(["--card", "h200", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["is_prediction"]
    assert 1.0 < found["ratios"]["head_over_floor"] <= 1.08
    assert found["targets"]["head_over_floor"]["bound"] == 1.08
    assert len(found["heads"]) == len(HEADS) * len(TOKENS)
    ratios = [case["designs"][TODAY.name]["over_floor"] for case in found["heads"]]
    assert found["ratios"]["head_over_floor"] == max(ratios)
    assert found["sensitivity"]["triton_main_loop"]["head_over_floor"][0] > max(ratios)
    assert set(found["assumptions"]) == set(sources()) >= set(found["sensitivity"])
    assert all(sources().values())
    assert "Predicted for h200, not measured" in capsys.readouterr().out
    assert read_figures(file) is None  # the README shows no prediction


def test_every_range_holds_its_value():
    for assumed in CARDS.values():
        for name, (low, high) in ranges(assumed).items():
            assert low <= getattr(assumed, name) <= high, name


def test_an_assumption_that_today_s_design_does_not_use_moves_nothing():
    moved = sensitivity(HEADS, [8192], H200)
    assert "exposed_traffic" in moved
    assert not {"former_epilogue", "score_share", "cast_ipc", "body_rate"} & set(moved)


def test_former_chunks_took_pairs_while_they_fitted():
    assert former_plan([1, 2, 2, 2, 3, 2, 4, 5, 1, 0], 10**9 // 16, 2).chunks == (7, 5, 9, 1)
    size, lengths = HEADS["qwen2.5-0.5b"], answer_lengths(8192)
    assert FORMER_A.plan(lengths, size).chunks == (1503, 1561, 1271, 875, 1333, 1192, 457)
    assert FORMER_B.plan(lengths, size).chunks == (3275, 3268, 1649)


def test_todays_chunks_are_the_package_s():
    for size in HEADS.values():
        for num_rows in (512, 4096, 8192, 32768):
            plan = TODAY.plan(answer_lengths(num_rows), size)
            assert sum(plan.chunks) == num_rows
            assert plan.rounds_at_once == (len(plan.chunks) == 1)
            assert max(plan.chunks) < 1.5 * min(plan.chunks)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_work_is_counted(count):
    """The formulas of docs/kernels.md, which tests of the head check by counting."""
    size, rows = HEADS["llama-3-8b"], 4000 * count
    found = predict(even(count), size, [rows], H200)
    assert found.flop == 6.0 * rows * size.weights
    assert found.launches == 16 * count + 12
    of_weights = 6 if count == 1 else 12 * count + 2
    moved = 6 * rows * size.vocab + of_weights * size.weights + 38 * rows * size.hidden
    assert found.bytes == moved
    text = (REPOSITORY / "docs" / "kernels.md").read_text()
    for formula in ("6NV + 6VH + 38NH", "6NV + 12CVH + 2VH + 38NH", "launches = 16C + 12"):
        assert formula in text


def test_a_soft_cap_costs_what_its_tiles_and_its_pass_do():
    """One tile's columns for each of the 132 cores, so that no wave is cut short."""
    rows, size = 128, Size(2048, 128 * 132)
    fused, unfused = (
        predict(design, size, (rows // 2, rows // 2), H200).seconds for design in CAPPED
    )
    products = 128 * 128 * 2048 / (2048 * 0.82 * 0.91)
    assert fused["logits"] == pytest.approx((products + 2 * 1167 * 1.54) / 1.65e9)
    assert fused["rows"] == 0.0
    assert unfused["rows"] == pytest.approx(rows * size.vocab * 6 / (0.885 * 4.3e12))
    found = capped_over_floor({"small": Size(896, 151936), "large": Size(4096, 128256)}, 8192, H200)
    assert found["small"]["triton_fused"] < 0.93 * found["small"]["triton"]
    assert 1.0 < found["large"]["triton_fused"] / found["large"]["triton"] < 1.03


def test_the_documented_predictions_are_today_s():
    """docs/performance.md has a line for each head, with a column for each number of rows."""
    text = (REPOSITORY / "docs" / "performance.md").read_text()
    cases = head_cases(HEADS, TOKENS, H200)
    for name, size in HEADS.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {name},"))
        assert f"H {size.hidden}, V {size.vocab}" in line
        ratios = [each.over_floor for each in cases if each.name == name]
        assert [float(cell) for cell in line.split("|")[2:-1]] == pytest.approx(ratios, abs=0.006)


def test_measured_figures_are_read(tmp_path):
    stamps = {"hardware": {"devices": ["NVIDIA H200"]}}
    times = {"ours_x": {"median": 0.5}, "floor": {"median": 0.4}}
    case = {"N": 8, "H": 2, "V": 4, "dtype": "bfloat16", "ours": "ours_x"}
    head = {"benchmark": "head", "stamps": stamps, "cases": [{**case, "forward_backward": times}]}
    profile = {
        "benchmark": "step_profile",
        "stamps": stamps,
        "case": {"shape": "0.5b", "checkpointing": True},
        **{"step_seconds": 3.0, "tokens": 100, "left_out": None, "liger_layers": []},
    }
    fused = {**profile, "step_seconds": 2.0, "liger_layers": ["LigerRMSNorm"]}
    absent = {**profile, "left_out": "there is no GPU"}
    for number, result in enumerate((head, profile, fused, absent, {"benchmark": "other"})):
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
    found = read_measured(tmp_path, "h200")
    assert (found.heads, found.floors) == ({(8, 2, 4): 0.5}, {(8, 2, 4): 0.4})
    assert found.steps == {("0.5b", True, False): 0.03, ("0.5b", True, True): 0.02}
    assert not read_measured(tmp_path, "h100").heads
    (tmp_path / "0.json").write_text(json.dumps({**head, "dry_run": True}))
    assert not read_measured(tmp_path, "h200").heads


def test_a_measured_figure_stands_beside_the_prediction(tmp_path, capsys):
    stamps = {"hardware": {"devices": ["NVIDIA H200"]}}
    times = {"ours_x": {"median": 0.01234}, "floor": {"median": 0.01}}
    case = {"N": 4096, "H": 896, "V": 151936, "dtype": "bfloat16", "ours": "ours_x"}
    head = {"benchmark": "head", "stamps": stamps, "cases": [{**case, "forward_backward": times}]}
    (tmp_path / "head.json").write_text(json.dumps(head))
    options = ["--hidden", "896", "--vocab", "151936", "--tokens", "4096"]
    main([*options, "--results", str(tmp_path)])
    out = capsys.readouterr().out
    assert "12.34" in out
    assert "1.234" in out


@pytest.mark.parametrize("arguments", [["--hidden", "8"], ["--vocab", "8"]])
def test_half_a_head_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "go together" in capsys.readouterr().err


def test_a_row_that_no_pair_fits_is_refused():
    with pytest.raises(SystemExit, match="--row-tokens 10: no pair fits"):
        main(["--shape", "0.5b", "--tokens", "4096", "--row-tokens", "10"])


def test_a_body_grows_with_its_layers():
    bodies = [predict_body("0.5b", 2048, H200, checkpointing=False, layers=n) for n in (1, 2)]
    one, two = (body.work for body in bodies)
    for kind in ("products", "elementwise", "attention"):
        assert two[kind].seconds > one[kind].seconds > 0.0
    assert two["products"].launches == 2 * one["products"].launches
    # Query, key, value, output and three of the MLP: forward, and two in the backward each.
    assert one["products"].launches == 3 * 7
    hidden, key, inner, tokens = 896, 128, 4864, bodies[0].tokens
    weights = 2 * hidden * hidden + 2 * hidden * key + 3 * hidden * inner
    assert one["products"].flop == 6.0 * tokens * weights


def test_checkpointing_runs_layers_again_and_fused_layers_move_less():
    def work(**changes):
        given = {"checkpointing": False, "layers": 1, **changes}
        return predict_body("0.5b", 2048, H200, **given).work

    plain, again, fused = work(), work(checkpointing=True), work(fused=True)
    assert again["products"].flop > plain["products"].flop
    assert again["attention"].launches == plain["attention"].launches + 1
    assert fused["products"].flop == plain["products"].flop
    assert fused["elementwise"].bytes < 0.6 * plain["elementwise"].bytes
    assert fused["elementwise"].launches < 0.5 * plain["elementwise"].launches


@pytest.mark.slow
def test_the_published_step():
    """Milliseconds and launches that were computed independently, for 0.5B and rows of 8192."""
    published = {True: (32.7, 40.7, 3.7, 4068), False: (26.4, 31.5, 2.9, 3156)}
    for checkpointing, (*times, launches) in published.items():
        body = predict_body("0.5b", 8192, H200, checkpointing=checkpointing)
        found = [1e3 * body.work[kind].seconds for kind in ("products", "elementwise", "attention")]
        assert found == pytest.approx(times, rel=0.02)
        assert body.launches == pytest.approx(launches, rel=0.01)
        assert len(head_cases(HEADS, [4096], H200)) == len(HEADS)
