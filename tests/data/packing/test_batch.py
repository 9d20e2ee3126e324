"""Copies of a micro-batch on another device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpofast.data.packing.packed_row import collate_packed
from dpofast.data.packing.padded_rows import collate_padded
from dpofast.model.pair_losses import batch_losses
from dpofast.train.steps.coupled import CoupledPairs
from dpofast_kernels import PairExtras, make_loss

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


class Copies(TorchDispatchMode):
    """Notes for each copy from the CPU to another device whether the host waits for it."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        options = kwargs or {}
        to = options.get("device")
        if func is torch.ops.aten._to_copy.default and args[0].device != to is not None:
            self.waits.append(not options.get("non_blocking", False))
        return func(*args, **options)


def test_the_host_waits_for_no_copy_of_what_pairs_share():
    """On a GPU it would wait for all work that is under way, in every micro-batch."""
    sequences = [([5, 6], [8, 9]), ([5, 6], [8]), ([5, 6], [7])]
    batch = collate_packed(sequences, None, group_sizes=[3], counts=[2, 1, 1], scored_prompts=[0])
    ref_logps = torch.zeros(4, dtype=torch.float64)
    pairs, prompts = torch.tensor([[0, 1], [0, 2]]), batch.prompts[[0, 0]]
    batch = replace(batch, pairs=pairs, prompts=prompts, ref_logps=ref_logps)
    with Copies() as copies:
        moved = batch.with_likelihood(1.0, 1.0).to("meta")
        logps = torch.empty(4, dtype=torch.float64, device="meta")  # of three answers and a prompt
        assert moved.of_pairs(logps).shape == moved.ref_logps.shape == (4,)
        assert moved.ref_of_sequences().shape == logps.shape
        assert moved.likelihood_of_pairs(logps).shape == (2,)
        losses, *_ = batch_losses(make_loss("ipo"), moved.of_pairs(logps), moved)
        extras = CoupledPairs.without_slopes(losses).added_to(PairExtras(), moved)
        assert extras.coefficients.shape == logps.shape
    assert len(copies.waits) > 6
    assert not any(copies.waits)
