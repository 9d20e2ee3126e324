"""Copies of a micro-batch on another device."""

from __future__ import annotations

from dataclasses import replace

import torch

from dpofast.data.packing.packed_row import collate_packed
from dpofast.data.packing.padded_rows import collate_padded

SEQUENCES = [([5, 6, 7], [8, 9]), ([5, 6, 7], [8])]


def test_moving_keeps_the_bounds_on_the_cpu():
    batch = collate_padded(SEQUENCES, [0.0] * 2).to("meta")
    assert batch.input_ids.device.type == batch.ref_logps.device.type == "meta"
    assert batch.bounds.device.type == "cpu"


def test_moving_takes_what_pairs_say_along():
    said = {"weights": torch.ones(1), "label_confidence": torch.ones(1), "sets": torch.zeros(1)}
    batch = replace(collate_padded(SEQUENCES, [0.0] * 2), **said, set_names=("a", "b")).to("meta")
    assert {getattr(batch, name).device.type for name in said} == {"meta"}
    assert batch.set_names == ("a", "b")


def test_a_copy_keeps_the_layout():
    batch = collate_packed([([1, 2], [3]), ([1, 2], [4])]).to("cpu")
    assert torch.equal(batch.shared_layout.position_ids, batch.position_ids[0])
