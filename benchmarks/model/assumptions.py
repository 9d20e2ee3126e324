"""What the model assumes: each number with its unit, its likely range and where it comes from.

The values are those of an H200. A prediction is as good as these numbers; `benchmarks.gpu` measures
the most important ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any


def _assumed(value: float, low: float, high: float, source: str) -> Any:
    """A field with its likely range; `replace` changes its value."""
    return field(default=value, metadata={"low": low, "high": high, "source": source})


@dataclass(frozen=True)
class Assumptions:
    """All assumed numbers, rates in units per second and times in seconds."""

    # bf16 operations per second of a large cuBLAS product. The data sheet's 989e12 are at a clock
    # that the power limit doesn't allow.
    rate: float = _assumed(790e12, 700e12, 820e12, "bare products on an H200, as others report")
    # Bytes per second of large copies; the data sheet says 4.8e12.
    bandwidth: float = _assumed(4.3e12, 4.0e12, 4.5e12, "90 % of the data sheet's")
    num_sms: float = _assumed(132, 132, 132, "data sheet")
    # Products of two bf16 numbers that an SM makes per cycle.
    products_per_cycle: float = _assumed(2048, 2048, 2048, "data sheet")
    # Cycles per second while the tensor cores work, and while they don't.
    tensor_clock: float = _assumed(1.65e9, 1.55e9, 1.75e9, "power-limited clock of Hopper cards")
    clock: float = _assumed(1.755e9, 1.6e9, 1.98e9, "clock of Hopper cards at light load")

    # Columns of K that the start and the end of a product cost.
    k_overhead: float = _assumed(180, 108, 252, "fits cuBLAS products reported on an H200")
    k_overhead_fp32: float = _assumed(290, 174, 406, "the same with an fp32 result")
    # Share of a product's peak that its main loop reaches.
    main_loop: float = _assumed(0.97, 0.95, 1.0, "fits cuBLAS products reported on an H200")
    # Share of an accumulator's traffic in d_weight that doesn't hide behind the product.
    exposed_traffic: float = _assumed(0.4, 0.2, 0.8, "a guess; benchmarks.gpu measures it")

    # Share of the tensor cores' peak that the main loop of Triton's product reaches.
    triton_main_loop: float = _assumed(0.82, 0.75, 0.88, "Triton's products reported on Hopper")
    # Instructions of a warp per tile of 128 x 256 after the main loop of `score_tiles`: at 086dbb7,
    # and today. Prototypes of today's had 712 to 873; tests/kernels/test_hot_loops.py holds the
    # number.
    former_epilogue: float = _assumed(2131, 2131, 2131, "counted in machine code for sm_90")
    lean_epilogue: float = _assumed(716, 700, 873, "counted in machine code for sm_90")
    # The same per tile of 128 x 128 of `score_tiles_wide`, for logits with a soft cap.
    capped_epilogue: float = _assumed(1167, 1167, 1167, "counted in machine code for sm_90")
    # Share of a large tile's main loop that one of 128 x 128 reaches.
    wide_main_loop: float = _assumed(0.91, 0.85, 1.0, "the same ratio of cuBLAS' tiles")
    # Cycles that one of these instructions takes, where two warps share a scheduler.
    cycles_per_slot: float = _assumed(1.54, 1.2, 1.9, "a guess from the mix of instructions")

    # Share of the bandwidth that the row kernels of fp32 logits reach.
    score_share: float = _assumed(0.79, 0.7, 0.9, "61 % of the issue slots are taken, counted")
    differentiate_share: float = _assumed(0.885, 0.8, 0.95, "32 % of the issue slots are taken")

    # Instructions per cycle and SM of PyTorch's casting multiplication, 87 an element.
    cast_ipc: float = _assumed(2.4, 1.6, 4.0, "a guess; 87 is counted in machine code for sm_90")
    # Share of the bandwidth that our own cast reaches.
    cast_share: float = _assumed(0.9, 0.8, 0.95, "80 instructions for 16 elements, counted")

    # Small kernels and gaps between a chunk's products.
    chunk_gap: float = _assumed(
        30e-6, 15e-6, 60e-6, "some 16 kernels a chunk, counted, most of them tiny"
    )
    # Time of the host before the first product. The benchmark's clock lets the host run ahead of
    # the device. Before it did, 100e-6 were seen: 150 to 250 us of Python, 64 us of them hidden.
    host_lead: float = _assumed(0.0, 0.0, 100e-6, "the clock of benchmarks.harness")

    # The body: products are smaller than the head's, and elementwise kernels don't reach a copy's
    # bandwidth.
    body_rate: float = _assumed(700e12, 600e12, 760e12, "cuBLAS on products of a layer's size")
    body_bandwidth: float = _assumed(3.6e12, 3.0e12, 4.2e12, "PyTorch's elementwise kernels")
    launch: float = _assumed(2e-6, 1.5e-6, 4e-6, "start and end of a kernel on the device")
    attention_rate: float = _assumed(330e12, 280e12, 400e12, "FlashAttention-2 on Hopper, forward")
    attention_backward_rate: float = _assumed(260e12, 200e12, 330e12, "the same, backward")


# Tiles of cuBLAS' products with the share of the peak that each reaches, and the numbers of parts
# that K is split into: fits products reported on an H200.
CUBLAS_TILES = (
    (128, 256, 0.97),
    (256, 128, 0.97),
    (128, 128, 0.88),
    (128, 192, 0.93),
    (256, 192, 0.97),
)
CUBLAS_SPLITS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
TILE = (128, 256)  # the tile of `score_tiles` on sm_90
WIDE_TILE = (128, 128)  # that of `score_tiles_wide`, which has a cap, a bias or statistics
# The warps of these tiles, and the schedulers that they share.
WARPS_PER_SCHEDULER = 8 / 4
LANES = 32
CAST_INSTRUCTIONS = 87  # of PyTorch's casting multiplication per element, counted in machine code
# Kernels of a chunk and of a call, and bytes that a call moves per element of its hidden states.
# Counted by the tests of the head; docs/kernels.md has the whole formula.
KERNELS_PER_CHUNK, KERNELS_PER_CALL = 16, 12
HIDDEN_STATE_BYTES = 38
# Bytes of fused AdamW per parameter in bf16: reads weight, gradient and two moments, writes three.
ADAMW_BYTES = 14

_H200 = Assumptions()
CARDS = {
    "h200": _H200,
    # The same chip with less bandwidth; the data sheet says 3.35e12.
    "h100": replace(_H200, bandwidth=3.0e12, body_bandwidth=2.5e12),
    # Data sheet: 312e12, 2.0e12, 108 SMs. The counts of instructions are those of sm_90.
    "a100": replace(
        _H200,
        rate=265e12,
        bandwidth=1.75e12,
        num_sms=108,
        products_per_cycle=1024,
        tensor_clock=1.3e9,
        clock=1.41e9,
        body_rate=235e12,
        body_bandwidth=1.5e12,
        attention_rate=190e12,
        attention_backward_rate=150e12,
    ),
}


def ranges(assumed: Assumptions) -> dict[str, tuple[float, float]]:
    """The likely range of every assumption, scaled where a card's value isn't the H200's."""
    found = {}
    for each in fields(assumed):
        scale = getattr(assumed, each.name) / each.default if each.default else 1.0
        found[each.name] = (scale * each.metadata["low"], scale * each.metadata["high"])
    return found


def sources() -> dict[str, str]:
    """Where each assumption comes from."""
    return {each.name: each.metadata["source"] for each in fields(Assumptions)}
