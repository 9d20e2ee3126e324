"""Back end "triton_fused": a matrix product that writes exp(z - k) and its sums, never logits.

z is a logit, and k is the label's own logit. Three kernels run one after the other:

    target_products   a dot product per row: the label's own logit, which serves as k
    score_tiles       the matrix product, tile by tile: exp(z - k), and its sum over each tile
    finish_rows       adds up a row's sums, which give its log-prob and the gradient at its label;
                      finish_triton explains it
"""

# Triton and torch.cuda.device_of have no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from dpofast_kernels.head.dtypes import accumulate_dtype, product_dtype
from dpofast_kernels.head.finish_triton import finish_rows_fwd, new_sums
from dpofast_kernels.head.launch import is_interpreted, launch_options
from dpofast_kernels.head.logits_triton import logit_constants
from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.pairs import Pairs, PairTerms, SequenceTerms
from dpofast_kernels.head.pairs_triton import pair_loss_fwd
from dpofast_kernels.head.rows import LogitGradients, ScoredRows
from dpofast_kernels.head.singles import Singles
from dpofast_kernels.head.singles_triton import sequence_loss_fwd
from dpofast_kernels.head.statistics_triton import statistic_constants
from dpofast_kernels.head.tiles_triton import score_tiles_kernel, target_products_kernel


class FusedRows:
    """`RowOps` made of the three kernels in tiles_triton."""

    vocab_major = False  # the kernels write contiguous rows

    def __init__(
        self, weight: Tensor, options: HeadOptions, statistics: tuple[str, ...] = ()
    ) -> None:
        if weight.stride(1) != 1:
            raise ValueError(
                f"weight has strides {weight.stride()}, but backend 'triton_fused' expects rows "
                "without gaps: pass weight.contiguous(), or choose another backend."
            )
        self.weight, self.statistics = weight, statistics
        self.bias = None if options.bias is None else options.bias.contiguous()
        self.constants = {**logit_constants(options), **statistic_constants(statistics)}
        # A bias, the slopes of a cap, statistics and fp32 gradients need registers. The largest
        # tiles leave no register free, so these cases get smaller tiles.
        is_wide = self.bias is not None or options.softcap is not None or bool(statistics)
        is_wide = is_wide or weight.dtype != torch.bfloat16
        self.tile_entry = "score_tiles_wide" if is_wide else "score_tiles"

    def workspace_dtype(self, keep: bool) -> torch.dtype | None:
        return product_dtype(self.weight) if keep else None

    def score(
        self, hidden_states: Tensor, labels: Tensor, workspace: Tensor | None, keep: bool
    ) -> ScoredRows:
        weight, device = self.weight, self.weight.device
        hidden_states, labels = hidden_states.contiguous(), labels.contiguous()
        num_rows, (vocab_size, hidden_size) = len(labels), weight.shape
        tiles = launch_options(self.tile_entry, device)
        if not _are_aligned(hidden_states, weight, *([] if workspace is None else [workspace])):
            # Descriptors can't read such rows. Pointers need registers, so the tiles are smaller.
            tiles = {**launch_options("score_tiles_wide", device), "DESCRIPTORS": False}
        if self.statistics and keep:
            # Logits and exponentials are in registers at once, and with a cap slopes, too.
            tiles = narrowed(tiles)
        num_tiles = triton.cdiv(vocab_size, tiles["BN"])
        targets = weight.new_empty(num_rows, dtype=accumulate_dtype(weight.dtype))
        sums = new_sums(targets, num_tiles, num_rows, bool(self.statistics))
        d_logits = workspace if keep else None
        strides = (hidden_states.stride(0), weight.stride(0))
        num_programs = _num_programs(device, triton.cdiv(num_rows, tiles["BM"]) * num_tiles)
        with torch.cuda.device_of(weight):
            target_products_kernel[(num_rows,)](
                hidden_states, weight, labels, targets, *strides, hidden_size,
                **launch_options("target_products", device),
            )  # fmt: skip
            score_tiles_kernel[(num_programs,)](
                *tile_sources(hidden_states, weight, tiles), tile_target(d_logits, targets, tiles),
                targets if self.bias is None else self.bias, labels, targets, sums,
                num_rows, vocab_size, hidden_size, *strides,
                0 if d_logits is None else d_logits.stride(0), num_programs,
                **self.constants, KEEP=keep, UPCAST=is_interpreted(score_tiles_kernel), **tiles,
            )  # fmt: skip
        return finish_rows_fwd(
            hidden_states, weight, self.bias, labels, targets, d_logits, sums,
            self.statistics, self.constants,
        )  # fmt: skip

    def differentiate(
        self, scored: ScoredRows, labels: Tensor, coefficients: Tensor
    ) -> LogitGradients:
        d_logits, factors = scored.kept
        return LogitGradients(d_logits, coefficients * factors)

    def pair_loss(self, per_token_logps: Tensor, pairs: Pairs) -> PairTerms:
        return pair_loss_fwd(per_token_logps, pairs)

    def sequence_loss(self, per_token_logps: Tensor, singles: Singles) -> SequenceTerms:
        return sequence_loss_fwd(per_token_logps, singles)


def narrowed(tiles: dict[str, Any]) -> dict[str, Any]:
    """Launch options of tiles half as wide, which need half the registers."""
    return {**tiles, "BN": tiles["BN"] // 2}


def _are_aligned(*matrices: Tensor) -> bool:
    """Whether all rows begin at multiples of 16 bytes, as the hardware's block loads need."""
    return all(
        matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
        for matrix in matrices
    )


def tile_sources(hidden_states: Tensor, weight: Tensor, tiles: dict[str, Any]) -> tuple[Any, Any]:
    """The inputs of score_tiles_kernel: descriptors of their blocks, or the tensors themselves."""
    if not tiles["DESCRIPTORS"]:
        return hidden_states, weight
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(hidden_states, [tiles["BM"], tiles["BK"]]),
        TensorDescriptor.from_tensor(weight, [tiles["BN"], tiles["BK"]]),
    )


def tile_target(d_logits: Tensor | None, unused: Tensor, tiles: dict[str, Any]) -> Any:
    """Where score_tiles_kernel writes: a descriptor of blocks, or the tensor itself."""
    if d_logits is None:
        return unused
    if not tiles["DESCRIPTORS"]:
        return d_logits
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(d_logits, [tiles["BM"], tiles["BN"]])


def _num_programs(device: torch.device, num_tiles: int) -> int:
    return min(_num_cores(device), num_tiles)


@lru_cache(maxsize=16)
def _num_cores(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # any number: the interpreter runs programs one after another
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
