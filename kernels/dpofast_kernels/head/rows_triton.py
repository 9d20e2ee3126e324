"""The row operations as Triton kernels over a chunk of logits, which torch.mm has made."""

# jit functions can't be typed, and Triton and torch.cuda.device_of are not
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.pairs_triton import pair_loss_fwd
from dpofast_kernels.head.rows import PairTerms, ScoredRows
from dpofast_kernels.preference import PairLoss

MAX_BLOCK_V = 4096


@triton.jit
def _tanh(x):
    """tanh(x) and its slope; libdevice's tanh is unknown to the interpreter."""
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    tanh = tl.where(x >= 0.0, magnitude, -magnitude)
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    if x.dtype != tl.float64:
        # 1 - e cancels close to 0; there Taylor's series is exact to fp32
        y = x * x
        series = 1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835))))
        tanh = tl.where(tl.abs(x) < 0.25, x * series, tanh)
    return tanh, slope


@triton.jit
def _finish_logits(
    b_z,  # a product of hidden state and weight
    p_bias,
    o_v,
    m_v,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
):
    """Finished logits, and their slope by the product."""
    b_slope = tl.full(b_z.shape, SCALE / TEMPERATURE, dtype=b_z.dtype)
    if HAS_BIAS:
        b_z += tl.load(p_bias + o_v, mask=m_v, other=0.0)
    if SOFTCAP is None:
        b_z = b_z * (SCALE / TEMPERATURE)
    else:
        b_tanh, b_tanh_slope = _tanh(b_z * (SCALE / SOFTCAP))
        b_z = b_tanh * (SOFTCAP / TEMPERATURE)
        b_slope = b_slope * b_tanh_slope
    return b_z, b_slope


@triton.jit
def row_logps_kernel(
    p_logits,  # [n, V], rows `stride` apart
    p_bias,  # [V]
    p_labels,  # [n] int64
    p_logps,  # [n]
    p_row_max,  # [n]
    p_sums,  # [n]
    stride,
    V,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BV: tl.constexpr,
):
    """Log-softmax at the labels; one program a row, one read of the logits."""
    i_n = tl.program_id(0).to(tl.int64)  # n V passes 2^31
    dtype: tl.constexpr = p_logits.dtype.element_ty
    p_row = p_logits + i_n * stride
    row_max = tl.full([], float("-inf"), dtype=dtype)
    sums = tl.full([], 0.0, dtype=dtype)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        m_v = o_v < V
        b_z = tl.load(p_row + o_v, mask=m_v, other=0.0)  # [BV]
        b_z, _ = _finish_logits(b_z, p_bias, o_v, m_v, HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE)
        b_z = tl.where(m_v, b_z, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(b_z, axis=0))
        sums = sums * tl.exp(row_max - new_max) + tl.sum(tl.exp(b_z - new_max), axis=0)
        row_max = new_max
    label = tl.load(p_labels + i_n)
    target = tl.load(p_row + label)
    target, _ = _finish_logits(target, p_bias, label, True, HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE)
    logp = target.to(tl.float64) - row_max.to(tl.float64) - tl.log(sums.to(tl.float64))
    tl.store(p_logps + i_n, logp.to(dtype))
    tl.store(p_row_max + i_n, row_max)
    tl.store(p_sums + i_n, sums)


@triton.jit
def d_logits_kernel(
    p_logits,  # [n, V], rows `stride` apart
    p_bias,  # [V]
    p_labels,  # [n] int64
    p_row_max,  # [n]
    p_sums,  # [n]
    p_d_logits,  # [n, V], rows `d_stride` apart; may be p_logits
    stride,
    d_stride,
    V,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BV: tl.constexpr,
):
    """Gradient of each row's log-prob by the product; rows on axis 0, vocabulary on axis 1."""
    i_n = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_v = o_v < V
    b_z = tl.load(p_logits + i_n * stride + o_v, mask=m_v, other=0.0)  # [BV]
    b_z, b_slope = _finish_logits(b_z, p_bias, o_v, m_v, HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE)
    b_p = tl.exp(b_z - tl.load(p_row_max + i_n)) / tl.load(p_sums + i_n)
    # 1 is subtracted before the one rounding to the output's dtype
    b_d = tl.where(o_v == tl.load(p_labels + i_n), 1.0 - b_p, -b_p) * b_slope
    p_d = p_d_logits + i_n * d_stride + o_v
    tl.store(p_d, b_d.to(p_d_logits.dtype.element_ty), mask=m_v)


class TritonRows:
    """`RowOps` of Triton kernels."""

    def __init__(self, options: HeadOptions, product_dtype: torch.dtype) -> None:
        self.bias = None if options.bias is None else options.bias.contiguous()
        self.product_dtype = product_dtype
        # constexprs: floats as arguments would be rounded to fp32, under fp64 logits, too
        self.constants = {
            "HAS_BIAS": options.bias is not None,
            "SCALE": options.logit_scale,
            "SOFTCAP": options.softcap,
            "TEMPERATURE": options.temperature,
        }

    def score(self, logits: Tensor, labels: Tensor) -> ScoredRows:
        num_rows, vocab_size = logits.shape
        logps, row_max, sums = (logits.new_empty(num_rows) for _ in range(3))
        labels = labels.contiguous()
        with torch.cuda.device_of(logits):
            row_logps_kernel[(num_rows,)](
                logits,
                logits if self.bias is None else self.bias,
                labels,
                logps,
                row_max,
                sums,
                logits.stride(0),
                vocab_size,
                **self.constants,
                BV=_block_v(vocab_size),
            )
        return ScoredRows(logps, logits, labels, row_max, sums)

    def d_logits(self, scored: ScoredRows, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        logits = scored.logits
        num_rows, vocab_size = logits.shape
        d_logits = logits
        if self.product_dtype != logits.dtype:
            d_logits = torch.empty_like(logits, dtype=self.product_dtype)
        block_v = _block_v(vocab_size)
        with torch.cuda.device_of(logits):
            d_logits_kernel[(num_rows, triton.cdiv(vocab_size, block_v))](
                logits,
                logits if self.bias is None else self.bias,
                scored.labels,
                scored.row_max,
                scored.sums,
                d_logits,
                logits.stride(0),
                d_logits.stride(0),
                vocab_size,
                **self.constants,
                BV=block_v,
            )
        return d_logits, coefficients

    def pair_loss(
        self, per_token_logps: Tensor, bounds: Tensor, ref_logps: Tensor, loss: PairLoss
    ) -> PairTerms:
        return pair_loss_fwd(per_token_logps, bounds, ref_logps, loss)


def _block_v(vocab_size: int) -> int:
    block: int = triton.next_power_of_2(vocab_size)
    return min(MAX_BLOCK_V, block)


def is_interpreted() -> bool:
    """Whether the kernels run on CPU tensors; Triton decides that when it makes them."""
    return not isinstance(row_logps_kernel, triton.JITFunction)
