"""Sums per sequence, the loss of each single answer and its metrics, in one kernel launch."""

# jit functions can't be typed, and Triton and torch.cuda.device_of have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpofast_kernels.head.launch import launch_options
from dpofast_kernels.head.options import SEQUENCE_METRIC_NAMES
from dpofast_kernels.head.pairs import SequenceTerms
from dpofast_kernels.head.pairs_triton import settings_of, sum_rows
from dpofast_kernels.head.singles import Singles
from dpofast_kernels.preference import UNPAIRED_LOSSES
from dpofast_kernels.preference.formulas_triton import UNPAIRED_FORMULAS

_REWARDS = tl.constexpr(SEQUENCE_METRIC_NAMES.index("rewards"))
_LOGRATIOS = tl.constexpr(SEQUENCE_METRIC_NAMES.index("logratios"))
# Arguments that can be slices with any alignment; each would compile another kernel.
_SLICES = ["p_per_token_logps", "p_ref_logps", "p_is_desirable", "p_weights"]


@triton.jit(do_not_specialize_on_alignment=_SLICES)
def sequence_loss_kernel(
    p_per_token_logps,  # [n]
    p_bounds,  # [S+1] int64
    p_ref_logps,  # [S] fp64
    p_is_desirable,  # [S] bool
    p_z,  # [] fp64
    p_weights,  # [S] fp64, read only with HAS_WEIGHTS
    p_settings,  # [4] fp64: see `settings_of`
    p_losses,  # [S] fp64
    p_logps,  # [S] fp64
    p_slopes,  # [S] fp64
    p_metrics,  # [2, S] fp64, in the order of SEQUENCE_METRIC_NAMES
    FORMULA: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum, loss, derivative and metrics; one program per sequence."""
    i_sequence = tl.program_id(0).to(tl.int64)
    logp, length = sum_rows(p_per_token_logps, p_bounds + i_sequence, BN)
    logratio = logp - tl.load(p_ref_logps + i_sequence)
    is_desirable = tl.load(p_is_desirable + i_sequence)
    beta = tl.load(p_settings)
    weight = tl.where(is_desirable, tl.load(p_settings + 2), tl.load(p_settings + 3))
    if HAS_WEIGHTS:
        weight *= tl.load(p_weights + i_sequence)
    loss, slope = FORMULA(logratio, tl.load(p_z), is_desirable, beta, weight)
    tl.store(p_losses + i_sequence, loss)
    tl.store(p_logps + i_sequence, logp)
    tl.store(p_slopes + i_sequence, slope)
    p_metrics += i_sequence
    tl.store(p_metrics + tl.num_programs(0) * _REWARDS, beta * logratio)
    tl.store(p_metrics + tl.num_programs(0) * _LOGRATIOS, logratio / length)


def sequence_loss_fwd(
    per_token_logps: Tensor,  # [n]
    singles: Singles,
) -> SequenceTerms:
    """Sums per sequence in fp64, each one's weighted loss, its derivative and its metrics.

    A loss that isn't in the registry is computed by PyTorch from the sums.
    """
    loss, ref_logps = singles.loss, singles.ref_logps.contiguous()
    # The class counts, not only the name: a subclass may have another formula.
    if type(loss) is not UNPAIRED_LOSSES.get(loss.name):
        return singles.terms_in_torch(per_token_logps)
    losses, logps, slopes = ref_logps.new_empty(3, len(ref_logps)).unbind()
    metrics = ref_logps.new_empty(len(SEQUENCE_METRIC_NAMES), len(ref_logps))
    weights = ref_logps if singles.weights is None else singles.weights.contiguous()
    with torch.cuda.device_of(per_token_logps):
        sequence_loss_kernel[(len(ref_logps),)](
            per_token_logps,
            singles.bounds.contiguous(),
            ref_logps,
            singles.is_desirable.contiguous(),
            singles.z,
            weights,
            settings_of(loss, ref_logps.device),
            losses,
            logps,
            slopes,
            metrics,
            FORMULA=UNPAIRED_FORMULAS[loss.name],
            HAS_WEIGHTS=singles.weights is not None,
            # The same sums as for pairs, of one sequence rather than two.
            **launch_options("pair_loss", ref_logps.device),
        )
    return SequenceTerms(losses, logps, slopes, metrics, None, None)
