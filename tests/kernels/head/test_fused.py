"""What only the fused product has: two kinds of block loads, and rows that are computed again."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import make_loss
from dpofast_kernels.head import finish_triton, fused_triton
from dpofast_kernels.head.launch import launch_table
from tests.kernels.head.cases import (
    FULL_OPTIONS,
    SHORT_LENGTHS,
    make_inputs,
    options_for,
    relative_error,
    run_pair_loss,
)

SIGMOID = make_loss("sigmoid", beta=0.3)


@pytest.fixture
def tiles(monkeypatch):
    """A function that changes the fused product's entries of the launch table."""

    def change(**changes):
        for name in ("score_tiles", "score_tiles_wide"):
            monkeypatch.setitem(
                launch_table()["cpu"], name, {**launch_table()["cpu"][name], **changes}
            )

    return change


def compare(inputs, tolerance, **options):
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive", **options))
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, "triton_fused", **options))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) <= tolerance, name


def noted_tiles(monkeypatch):
    """A list that every launched configuration of tiles is appended to."""
    used = []
    sources = fused_triton.tile_sources

    def noting(*given):
        used.append(given[-1])
        return sources(*given)

    monkeypatch.setattr(fused_triton, "tile_sources", noting)
    return used


@pytest.mark.parametrize("by_descriptor", [True, False])
@pytest.mark.parametrize(("hidden_size", "vocab_size"), [(64, 507), (72, 512)])
def test_block_loads_by_descriptor_and_by_pointer(
    by_descriptor, hidden_size, vocab_size, tiles, monkeypatch
):
    tiles(DESCRIPTORS=by_descriptor)
    used = noted_tiles(monkeypatch)
    compare(make_inputs(hidden_size=hidden_size, vocab_size=vocab_size), 1e-12)
    assert [each["DESCRIPTORS"] for each in used] == [by_descriptor]


@pytest.mark.parametrize("by_descriptor", [True, False])
def test_rows_that_are_not_aligned_are_loaded_by_pointer_in_smaller_tiles(
    by_descriptor, tiles, monkeypatch
):
    """Whatever the table says about the largest tiles. With pointers, only smaller ones compile."""
    tiles(DESCRIPTORS=by_descriptor)
    wide = {**launch_table()["cpu"]["score_tiles_wide"], "BM": 16}
    monkeypatch.setitem(launch_table()["cpu"], "score_tiles_wide", wide)
    used = noted_tiles(monkeypatch)
    inputs = make_inputs(torch.bfloat16, hidden_size=63)
    exact = inputs.to(torch.float64)
    truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive"))
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, "triton_fused"))
    assert relative_error(found["logps"], truth["logps"]) <= 1e-6
    assert [(each["BM"], each["DESCRIPTORS"]) for each in used] == [(16, False)]


@pytest.mark.parametrize("blocks", [(16, 64, 16, 1), (64, 32, 32, 3), (128, 256, 64, 8)], ids=str)
def test_any_tiles_give_the_same(blocks, tiles):
    tiles(**dict(zip(("BM", "BN", "BK", "GROUP"), blocks, strict=True)))
    compare(make_inputs(hidden_size=48, bias=True), 1e-12, **FULL_OPTIONS)


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_rows_computed_again_equal_the_others(full, monkeypatch):
    """With a bound of 0, every row takes the path for labels of vanishing probability."""
    monkeypatch.setattr(finish_triton, "MAX_REST", 0.0)
    compare(make_inputs(bias=full, lengths=SHORT_LENGTHS), 1e-12, **(FULL_OPTIONS if full else {}))


def test_labels_of_vanishing_probability():
    """exp(z - z_label) overflows fp32 in some rows and passes MAX_REST in others."""
    inputs = make_inputs(torch.float32, spread=1.0)
    with torch.no_grad():
        inputs.hidden_states[::5] *= 60.0
        inputs.hidden_states[1::5] *= 25.0
    exact = inputs.to(torch.float64)
    truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive"))
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, "triton_fused"))
    gaps = (inputs.hidden_states @ inputs.weight.t()).detach()
    gaps = gaps.amax(-1) - gaps.gather(-1, inputs.labels[:, None])[:, 0]
    assert gaps.max() > 89.0
    assert ((gaps > 67.0) & (gaps < 88.0)).any()
    for name in ("logps", "hidden_states", "weight"):
        assert relative_error(found[name], truth[name]) <= 1e-5, name


def test_a_row_of_nan_changes_no_other():
    inputs = make_inputs(torch.float32)
    clean = run_pair_loss(inputs, SIGMOID, options_for(inputs, "triton_fused"))
    inputs.hidden_states.data[0] = float("nan")
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, "triton_fused"))
    assert found["logps"][0].isnan()
    assert torch.equal(found["logps"][1:], clean["logps"][1:])
    later = inputs.bounds[2]
    assert torch.equal(found["hidden_states"][later:], clean["hidden_states"][later:])


def test_float32_is_refused_where_kernels_are_compiled(monkeypatch):
    monkeypatch.setattr(fused_triton, "is_interpreted", lambda kernel: False)
    inputs = make_inputs(torch.float32)
    with pytest.raises(ValueError, match=r"weight is torch.float32.*choose backend 'triton'"):
        fused_triton.FusedRows(inputs.weight, options_for(inputs, "triton_fused"))
