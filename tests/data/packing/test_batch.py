"""Copies of a micro-batch on another device."""

from __future__ import annotations

import torch

from dpofast.data.packing.packed_row import collate_packed
from dpofast.data.packing.padded_rows import collate_padded

SEQUENCES = [([5, 6, 7], [8, 9]), ([5, 6, 7], [8])]


def test_moving_keeps_the_bounds_on_the_cpu():
    batch = collate_padded(SEQUENCES, [0.0] * 2).to("meta")
    assert batch.input_ids.device.type == batch.ref_logps.device.type == "meta"
    assert batch.bounds.device.type == "cpu"


def test_a_copy_keeps_the_layout():
    batch = collate_packed([([1, 2], [3]), ([1, 2], [4])]).to("cpu")
    assert torch.equal(batch.shared_layout.position_ids, batch.position_ids[0])
