"""The head's forward and backward on a GPU: operations, bytes, launches and time of each part.

A design is one way to run the head. `TODAY` is what the package does for bf16 on CUDA; the others
are what it did at 086dbb7, whose predicted times were computed independently and are a check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.model.assumptions import (
    CAST_INSTRUCTIONS,
    CUBLAS_SPLITS,
    CUBLAS_TILES,
    HIDDEN_STATE_BYTES,
    KERNELS_PER_CALL,
    KERNELS_PER_CHUNK,
    LANES,
    TILE,
    WARPS_PER_SCHEDULER,
    WIDE_TILE,
    Assumptions,
)
from benchmarks.model.plans import Plan, former_plan, todays_plan

BF16, FP32 = 2, 4  # bytes
PARTS = ("logits", "rows", "d_hidden_states", "d_weight", "gaps", "cast")


@dataclass(frozen=True)
class Size:
    """The size of a head: H and V."""

    hidden: int
    vocab: int

    @property
    def weights(self) -> int:
        return self.hidden * self.vocab


# The heads that are predicted unless one is asked for.
HEADS = {
    "qwen2.5-0.5b": Size(896, 151936),
    "llama-3.2-1b": Size(2048, 128256),
    "gemma-2-2b": Size(2304, 256000),
    "qwen2.5-7b": Size(3584, 152064),
    "llama-3-8b": Size(4096, 128256),
}


@dataclass(frozen=True)
class Design:
    """One way to run the head in bf16.

    Attributes:
        name: name in tables and JSON.
        epilogue: the assumption that gives the epilogue of the product in tiles; None for logits
            in fp32, which PyTorch multiplies and two row kernels read.
        is_cast_quick: whether our own kernel casts the gradients, not PyTorch's multiplication.
        plan: function from the lengths of the answers and a head's size to the chunks.
        tile: rows and columns of the product's tiles; without an epilogue there are none.
        is_one_pass: whether one row kernel works on logits in fp32, not two.
    """

    name: str
    epilogue: str | None
    is_cast_quick: bool
    plan: Callable[[Sequence[int], Size], Plan]
    tile: tuple[int, int] = TILE
    is_one_pass: bool = False


def _today(lengths: Sequence[int], size: Size) -> Plan:
    return todays_plan(lengths, size.hidden, size.vocab)


def _former(element_bytes: int) -> Callable[[Sequence[int], Size], Plan]:
    return lambda lengths, size: former_plan(lengths, size.vocab, element_bytes)


FORMER_A = Design("triton at 086dbb7", None, False, _former(FP32))
FORMER_B = Design("triton_fused at 086dbb7", "former_epilogue", False, _former(BF16))
TODAY = Design("today", "lean_epilogue", True, _today)
DESIGNS = (TODAY, FORMER_B, FORMER_A)
# Both ways of a head with a soft cap, as they are today.
CAPPED = (
    Design("triton_fused", "capped_epilogue", True, _today, tile=WIDE_TILE),
    Design("triton", None, True, _today, is_one_pass=True),
)


@dataclass(frozen=True)
class Prediction:
    """What one call of the head takes.

    Attributes:
        chunks: rows of each chunk.
        seconds: time of each part, with the names in PARTS.
        flop: operations of the products.
        bytes: bytes that kernels read and write, each operand counted once a kernel.
        launches: kernels.
    """

    chunks: tuple[int, ...]
    seconds: dict[str, float]
    flop: float
    bytes: float
    launches: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def predict(design: Design, size: Size, lengths: Sequence[int], assumed: Assumptions) -> Prediction:
    """Predict the head's forward and backward.

    Args:
        design: how the head runs.
        size: H and V.
        lengths: [2P], scored tokens of each answer.
        assumed: the card.
    """
    plan = design.plan(lengths, size)
    chunks, is_direct, total_rows = plan.chunks, plan.rounds_at_once, sum(plan.chunks)
    seconds = dict.fromkeys(PARTS, 0.0)
    seconds["gaps"] = assumed.host_lead
    moved = 0.0
    for index, rows in enumerate(chunks):
        result_bytes = BF16 if is_direct else FP32
        is_added = index > 0  # later chunks read the sum of earlier ones, too
        seconds["logits"] += _logits_time(design, rows, size, assumed)
        seconds["rows"] += _rows_time(design, rows, size, assumed)
        seconds["d_hidden_states"] += hidden_grad_time(rows, size, assumed)
        seconds["d_weight"] += weight_grad_time(rows, size, result_bytes, is_added, assumed)
        seconds["gaps"] += assumed.chunk_gap
        moved += _chunk_bytes(design, rows, size)
        moved += result_bytes * size.weights * (2 if is_added else 1)
    cast_weights = 0 if is_direct else size.weights
    cast_elements = total_rows * size.hidden + cast_weights
    seconds["cast"] = cast_elements / _cast_rate(design.is_cast_quick, assumed)
    moved += HIDDEN_STATE_BYTES * total_rows * size.hidden + (FP32 + BF16) * cast_weights
    return Prediction(
        chunks,
        seconds,
        flop=6.0 * total_rows * size.weights,
        bytes=moved,
        launches=len(chunks) * KERNELS_PER_CHUNK + KERNELS_PER_CALL,
    )


def floor_seconds(num_rows: int, size: Size, assumed: Assumptions) -> float:
    """Time of the bare products of all rows at once, in bf16: the benchmark's `floor`."""
    return (
        cublas_logits_time(num_rows, size, BF16, assumed)
        + hidden_grad_time(num_rows, size, assumed)
        + weight_grad_time(num_rows, size, BF16, False, assumed)
    )


def cublas_logits_time(rows: int, size: Size, result_bytes: int, assumed: Assumptions) -> float:
    """Seconds of PyTorch's product that gives the logits [n, V]."""
    overhead = assumed.k_overhead if result_bytes == BF16 else assumed.k_overhead_fp32
    products = 2 * rows * size.weights / assumed.rate * (size.hidden + overhead) / size.hidden
    return max(products, rows * size.vocab * result_bytes / assumed.bandwidth)


def tiles_time(
    rows: int, size: Size, epilogue: str, tile: tuple[int, int], assumed: Assumptions
) -> float:
    """Seconds of `score_tiles`: main loop and epilogue of a tile follow one another."""
    tile_rows, tile_columns = tile
    share = assumed.triton_main_loop * (1.0 if tile == TILE else assumed.wide_main_loop)
    tiles = math.ceil(rows / tile_rows) * math.ceil(size.vocab / tile_columns)
    main = tile_rows * tile_columns * size.hidden / assumed.products_per_cycle
    instructions = WARPS_PER_SCHEDULER * getattr(assumed, epilogue)
    cycles = main / share + instructions * assumed.cycles_per_slot
    return math.ceil(tiles / assumed.num_sms) * cycles / assumed.tensor_clock


def hidden_grad_time(rows: int, size: Size, assumed: Assumptions) -> float:
    """Seconds of d_logits [n, V] times weight [V, H], with the best of cuBLAS' tiles.

    The result is small, so tiles that don't fill the card in whole waves cost time, and splitting K
    costs traffic of partial results, half of it hidden.
    """
    found = []
    for tile_rows, tile_columns, share in CUBLAS_TILES:
        tiles = math.ceil(rows / tile_rows) * math.ceil(size.hidden / tile_columns)
        tile_flop = 2 * tile_rows * tile_columns * size.vocab
        for parts in CUBLAS_SPLITS:
            waves = math.ceil(tiles * parts / assumed.num_sms)
            products = waves * tile_flop / parts / (assumed.rate / assumed.num_sms) / share
            partial = 0.0 if parts == 1 else 2 * FP32 * rows * size.hidden * parts * 0.5
            found.append(products + partial / assumed.bandwidth)
    return min(found)


def weight_grad_time(
    rows: int, size: Size, result_bytes: int, is_added: bool, assumed: Assumptions
) -> float:
    """Seconds of d_logits^T [V, n] times hidden states [n, H], written or added to a sum.

    A part of the traffic that a bf16 result wouldn't have is exposed. Where the rows are few, the
    traffic takes longer than the products.
    """
    products = 2 * rows * size.weights / assumed.rate / assumed.main_loop
    products *= (rows + assumed.k_overhead) / rows
    traffic = result_bytes * size.weights * (2 if is_added else 1)
    exposed = 0 if result_bytes == BF16 else traffic if is_added else traffic // 2
    shown = assumed.exposed_traffic * exposed / assumed.bandwidth
    return max(products + shown, (traffic + BF16 * rows * size.vocab) / assumed.bandwidth)


def _logits_time(design: Design, rows: int, size: Size, assumed: Assumptions) -> float:
    if design.epilogue is None:
        return cublas_logits_time(rows, size, FP32, assumed)
    return tiles_time(rows, size, design.epilogue, design.tile, assumed)


def _rows_time(design: Design, rows: int, size: Size, assumed: Assumptions) -> float:
    """Seconds of the passes over fp32 logits: one reads, one reads and writes bf16.

    With a cap, too, the passes wait for memory: an element takes 16 instructions and 6 bytes.
    """
    if design.epilogue is not None:
        return 0.0
    scored = 0.0 if design.is_one_pass else FP32 / assumed.score_share
    differentiated = (FP32 + BF16) / assumed.differentiate_share
    return rows * size.vocab * (scored + differentiated) / assumed.bandwidth


def _cast_rate(is_quick: bool, assumed: Assumptions) -> float:
    """Elements per second that are multiplied and cast from fp32 to bf16."""
    if is_quick:
        return assumed.cast_share * assumed.bandwidth / (FP32 + BF16)
    lanes = assumed.num_sms * LANES * assumed.clock
    return assumed.cast_ipc * lanes / CAST_INSTRUCTIONS


def _chunk_bytes(design: Design, rows: int, size: Size) -> float:
    """Bytes of a chunk's kernels in tensors of the sizes [n, V] and [V, H], without d_weight.

    The product writes the logits, and two products read their gradients. Between them, two row
    kernels read fp32 logits, and the second of them writes gradients.
    """
    made = BF16 if design.epilogue is not None else FP32
    passes = FP32 + BF16 if design.is_one_pass else 2 * FP32 + BF16
    row_work = 0 if design.epilogue is not None else passes
    return rows * size.vocab * (made + row_work + 2 * BF16) + 2 * BF16 * size.weights
