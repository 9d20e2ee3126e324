"""Sums per sequence, the loss of each pair and its metrics, in one kernel launch."""

# jit functions can't be typed, and Triton and torch.cuda.device_of have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpofast_kernels.head.launch import launch_options
from dpofast_kernels.head.rows import PairTerms
from dpofast_kernels.preference import LOSSES, METRIC_NAMES, PairLoss
from dpofast_kernels.preference.formulas_triton import FORMULAS

# Index of each metric in the output [8, P]. A jit function can read globals only if they are
# constexprs.
_REWARDS_CHOSEN = tl.constexpr(METRIC_NAMES.index("rewards/chosen"))
_REWARDS_REJECTED = tl.constexpr(METRIC_NAMES.index("rewards/rejected"))
_REWARDS_MARGINS = tl.constexpr(METRIC_NAMES.index("rewards/margins"))
_REWARDS_ACCURACIES = tl.constexpr(METRIC_NAMES.index("rewards/accuracies"))
_LOGPS_CHOSEN = tl.constexpr(METRIC_NAMES.index("logps/chosen"))
_LOGPS_REJECTED = tl.constexpr(METRIC_NAMES.index("logps/rejected"))
_LOGRATIOS_CHOSEN = tl.constexpr(METRIC_NAMES.index("logratios/chosen"))
_LOGRATIOS_REJECTED = tl.constexpr(METRIC_NAMES.index("logratios/rejected"))


@triton.jit
def _sum_rows(p_logps, start, end, BN: tl.constexpr):
    """Sum of rows start:end in fp64. The order depends only on their number, not on `start`."""
    b_sum = tl.zeros([BN], dtype=tl.float64)
    for i_start in range(start, end, BN):
        o_n = i_start + tl.arange(0, BN)
        b_sum += tl.load(p_logps + o_n, mask=o_n < end, other=0.0).to(tl.float64)  # [BN]
    return tl.sum(b_sum, axis=0)


@triton.jit
def no_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option):
    """The formula of a loss that is computed outside the kernel."""
    return chosen * 0.0, chosen * 0.0, chosen * 0.0


# p_per_token_logps can be a slice with any alignment; each would compile another kernel.
@triton.jit(do_not_specialize_on_alignment=["p_per_token_logps"])
def pair_loss_kernel(
    p_per_token_logps,  # [n]
    p_bounds,  # [2P+1] int64
    p_ref_logps,  # [2P] fp64
    p_settings,  # [3] fp64: see `_settings`. Triton would round float arguments to fp32.
    p_losses,  # [P] fp64
    p_logps,  # [2P] fp64
    p_d_logps,  # [2P] fp64
    p_metrics,  # [8, P] fp64, in the order of METRIC_NAMES
    FORMULA: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums, loss, derivatives and metrics; one program per pair."""
    i_pair = tl.program_id(0).to(tl.int64)
    start = tl.load(p_bounds + 2 * i_pair)
    middle = tl.load(p_bounds + 2 * i_pair + 1)
    end = tl.load(p_bounds + 2 * i_pair + 2)
    chosen = _sum_rows(p_per_token_logps, start, middle, BN)
    rejected = _sum_rows(p_per_token_logps, middle, end, BN)
    chosen_logratio = chosen - tl.load(p_ref_logps + 2 * i_pair)
    rejected_logratio = rejected - tl.load(p_ref_logps + 2 * i_pair + 1)
    chosen_length = (middle - start).to(tl.float64)
    rejected_length = (end - middle).to(tl.float64)
    beta = tl.load(p_settings)
    loss, d_chosen, d_rejected = FORMULA(
        chosen_logratio,
        rejected_logratio,
        chosen_length,
        rejected_length,
        beta,
        tl.load(p_settings + 1),
        tl.load(p_settings + 2),
    )
    tl.store(p_losses + i_pair, loss)
    tl.store(p_logps + 2 * i_pair, chosen)
    tl.store(p_logps + 2 * i_pair + 1, rejected)
    tl.store(p_d_logps + 2 * i_pair, d_chosen)
    tl.store(p_d_logps + 2 * i_pair + 1, d_rejected)
    # The same metrics as in dpofast_kernels.preference.pair_metrics.
    num_pairs = tl.num_programs(0)
    p_metrics += i_pair
    chosen_reward, rejected_reward = beta * chosen_logratio, beta * rejected_logratio
    is_right = (chosen_reward > rejected_reward).to(tl.float64)
    tl.store(p_metrics + num_pairs * _REWARDS_CHOSEN, chosen_reward)
    tl.store(p_metrics + num_pairs * _REWARDS_REJECTED, rejected_reward)
    tl.store(p_metrics + num_pairs * _REWARDS_MARGINS, chosen_reward - rejected_reward)
    tl.store(p_metrics + num_pairs * _REWARDS_ACCURACIES, is_right)
    tl.store(p_metrics + num_pairs * _LOGPS_CHOSEN, chosen)
    tl.store(p_metrics + num_pairs * _LOGPS_REJECTED, rejected)
    tl.store(p_metrics + num_pairs * _LOGRATIOS_CHOSEN, chosen_logratio / chosen_length)
    tl.store(p_metrics + num_pairs * _LOGRATIOS_REJECTED, rejected_logratio / rejected_length)


def pair_loss_fwd(
    per_token_logps: Tensor,  # [n]
    bounds: Tensor,  # [2P+1]
    ref_logps: Tensor,  # [2P]
    loss: PairLoss,
) -> PairTerms:
    """Sums per sequence in fp64, each pair's loss, and its metrics.

    A loss without a formula in Triton is computed by PyTorch from the sums.
    """
    formula = formula_of(loss)
    num_pairs = len(ref_logps) // 2
    losses, logps = ref_logps.new_empty(num_pairs), torch.empty_like(ref_logps)
    d_logps = torch.empty_like(ref_logps)
    metrics = ref_logps.new_empty(len(METRIC_NAMES), num_pairs)
    with torch.cuda.device_of(per_token_logps):
        pair_loss_kernel[(num_pairs,)](
            per_token_logps,
            bounds.contiguous(),
            ref_logps.contiguous(),
            _settings(loss.beta, loss.label_smoothing, loss.option, ref_logps.device),
            losses,
            logps,
            d_logps,
            metrics,
            FORMULA=no_formula if formula is None else formula,
            **launch_options("pair_loss", ref_logps.device),
        )
    if formula is None:
        logratios, lengths = logps - ref_logps, bounds.diff().view(-1, 2)  # [2P], [P, 2]
        losses, *slopes = loss.pair_loss(logratios[0::2], logratios[1::2], lengths)
        d_logps = torch.stack(slopes, 1).flatten()
    return PairTerms(losses, logps, d_logps, metrics)


@lru_cache(maxsize=64)
def _settings(beta: float, label_smoothing: float, option: float, device: torch.device) -> Tensor:
    """[3] fp64 on the device: beta, label_smoothing and the loss's own option.

    It is cached, because each copy to the device makes the host wait.
    """
    return torch.tensor([beta, label_smoothing, option], dtype=torch.float64, device=device)


def formula_of(loss: PairLoss) -> Any:
    """The jit function of a loss; None for a loss that isn't in the registry."""
    # The class counts, not only the name: a subclass may have another formula.
    return FORMULAS[loss.name] if type(loss) is LOSSES.get(loss.name) else None
