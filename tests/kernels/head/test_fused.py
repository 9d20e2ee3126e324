"""What only the fused product has: tiles of any size, loaded and stored in two ways."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import make_loss
from dpofast_kernels.head import fused_triton
from dpofast_kernels.head.launch import launch_table
from tests.kernels.head.cases import (
    FULL_OPTIONS,
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


@pytest.mark.parametrize("by_descriptor", [True, False])
def test_nothing_beyond_the_padding_of_a_row_is_written(by_descriptor, tiles):
    """The vocabulary ends within a tile, and within the 16 columns that are stored at once."""
    tiles(DESCRIPTORS=by_descriptor, BM=16, BN=64)
    inputs = make_inputs(torch.bfloat16, hidden_size=64, vocab_size=203, lengths=(4, 5))
    rows = fused_triton.FusedRows(inputs.weight.detach(), options_for(inputs, "triton_fused"))
    memory = torch.full((11, 256), 7.0)
    workspace = memory[1:10, 16:].as_strided((9, 203), (256, 1))
    rows.score(inputs.hidden_states.detach(), inputs.labels, workspace, True)
    assert (workspace != 7.0).all()
    assert (memory[0] == 7.0).all()
    assert (memory[10, :16] == 7.0).all()
    assert (memory[1:10, :16] == 7.0).all()
    assert (memory[1:10, 16 + 208 :] == 7.0).all()


@pytest.mark.parametrize("labels", ["in no tile", "in every tile"])
def test_tiles_with_and_without_labels(labels, tiles):
    """Only tiles that contain a label, or the end of the vocabulary, are masked."""
    tiles(BM=16, BN=32)
    inputs = make_inputs(vocab_size=128, lengths=(7, 5))
    spread = torch.arange(12) * 11
    inputs.labels = spread.clamp(max=127) if labels == "in every tile" else spread.remainder(32)
    compare(inputs, 1e-12)
