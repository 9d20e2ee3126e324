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
from dpofast_kernels.head.pairs import Pairs, PairTerms
from dpofast_kernels.head.sequences import segment_sums
from dpofast_kernels.preference import LOSSES, METRIC_NAMES, PairLoss, PreferenceLoss
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
def sum_rows(p_logps, p_bound, BN: tl.constexpr):
    """Sum over a sequence's rows, and their number, in fp64.

    The order of the sum depends only on the number of rows, not on where they start.
    """
    start, end = tl.load(p_bound), tl.load(p_bound + 1)
    b_sum = tl.zeros([BN], dtype=tl.float64)
    for i_start in range(start, end, BN):
        o_n = i_start + tl.arange(0, BN)
        b_sum += tl.load(p_logps + o_n, mask=o_n < end, other=0.0).to(tl.float64)  # [BN]
    return tl.sum(b_sum, axis=0), (end - start).to(tl.float64)


@triton.jit
def no_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second):
    """The formula of a loss that is computed outside the kernel, or that is 0."""
    nothing = tl.zeros_like(chosen)
    return nothing, nothing, nothing


# p_per_token_logps can be a slice with any alignment; each would compile another kernel.
@triton.jit(do_not_specialize_on_alignment=["p_per_token_logps"])
def pair_loss_kernel(
    p_per_token_logps,  # [n]
    p_bounds,  # [S+1] int64
    p_ref_logps,  # [S] fp64
    p_pairs,  # [P, 2] int64, read only with HAS_PAIRS
    p_smoothing,  # [P] fp64, read only with HAS_SMOOTHING
    p_settings,  # [4] fp64: see `settings_of`. Triton would round float arguments to fp32.
    p_losses,  # [P] fp64
    p_logps,  # [P, 2] fp64
    p_slopes,  # [P, 2] fp64
    p_metrics,  # [8, P] fp64, in the order of METRIC_NAMES
    FORMULA: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums, loss, derivatives and metrics; one program per pair."""
    i_pair = tl.program_id(0).to(tl.int64)
    if HAS_PAIRS:
        i_chosen, i_rejected = tl.load(p_pairs + 2 * i_pair), tl.load(p_pairs + 2 * i_pair + 1)
    else:
        i_chosen, i_rejected = 2 * i_pair, 2 * i_pair + 1
    chosen, chosen_length = sum_rows(p_per_token_logps, p_bounds + i_chosen, BN)
    rejected, rejected_length = sum_rows(p_per_token_logps, p_bounds + i_rejected, BN)
    chosen_logratio = chosen - tl.load(p_ref_logps + i_chosen)
    rejected_logratio = rejected - tl.load(p_ref_logps + i_rejected)
    beta, smoothing = tl.load(p_settings), tl.load(p_settings + 1)
    if HAS_SMOOTHING:
        smoothing = tl.load(p_smoothing + i_pair)
    loss, d_chosen, d_rejected = FORMULA(
        chosen_logratio,
        rejected_logratio,
        chosen_length,
        rejected_length,
        beta,
        smoothing,
        tl.load(p_settings + 2),
        tl.load(p_settings + 3),
    )
    tl.store(p_losses + i_pair, loss)
    tl.store(p_logps + 2 * i_pair, chosen)
    tl.store(p_logps + 2 * i_pair + 1, rejected)
    tl.store(p_slopes + 2 * i_pair, d_chosen)
    tl.store(p_slopes + 2 * i_pair + 1, d_rejected)
    # The same metrics as in dpofast_kernels.preference.pair_metrics.
    num_pairs = tl.num_programs(0)
    p_metrics += i_pair
    chosen_mean, rejected_mean = (
        chosen_logratio / chosen_length,
        rejected_logratio / rejected_length,
    )
    if PER_TOKEN:
        chosen_reward, rejected_reward = beta * chosen_mean, beta * rejected_mean
    else:
        chosen_reward, rejected_reward = beta * chosen_logratio, beta * rejected_logratio
    is_right = (chosen_reward > rejected_reward).to(tl.float64)
    tl.store(p_metrics + num_pairs * _REWARDS_CHOSEN, chosen_reward)
    tl.store(p_metrics + num_pairs * _REWARDS_REJECTED, rejected_reward)
    tl.store(p_metrics + num_pairs * _REWARDS_MARGINS, chosen_reward - rejected_reward)
    tl.store(p_metrics + num_pairs * _REWARDS_ACCURACIES, is_right)
    tl.store(p_metrics + num_pairs * _LOGPS_CHOSEN, chosen)
    tl.store(p_metrics + num_pairs * _LOGPS_REJECTED, rejected)
    tl.store(p_metrics + num_pairs * _LOGRATIOS_CHOSEN, chosen_mean)
    tl.store(p_metrics + num_pairs * _LOGRATIOS_REJECTED, rejected_mean)


def pair_loss_fwd(
    per_token_logps: Tensor,  # [n]
    pairs: Pairs,
) -> PairTerms:
    """Sums per sequence in fp64, each pair's loss, and its metrics.

    A loss without a formula in Triton is computed by PyTorch from the sums.
    """
    loss, ref_logps, incidence = pairs.loss, pairs.ref_logps.contiguous(), pairs.incidence
    formula, num_pairs = formula_of(loss), len(pairs.pair_list)
    losses = ref_logps.new_empty(num_pairs)
    logps, slopes = ref_logps.new_empty(2, num_pairs, 2).unbind()
    metrics = ref_logps.new_empty(len(METRIC_NAMES), num_pairs)
    bounds = pairs.bounds.contiguous()
    with torch.cuda.device_of(per_token_logps):
        pair_loss_kernel[(num_pairs,)](
            per_token_logps,
            bounds,
            ref_logps,
            bounds if incidence is None else incidence.pairs.contiguous(),
            ref_logps if pairs.smoothing is None else pairs.smoothing.contiguous(),
            settings_of(loss, ref_logps.device),
            losses,
            logps,
            slopes,
            metrics,
            FORMULA=no_formula if formula is None else formula,
            HAS_PAIRS=incidence is not None,
            HAS_SMOOTHING=pairs.smoothing is not None,
            PER_TOKEN=loss.has_rewards_per_token,
            **launch_options("pair_loss", ref_logps.device),
        )
    # A sequence may be in several pairs or in none, and the kernel's sums are those of pairs.
    sums = logps.flatten() if incidence is None else segment_sums(per_token_logps, bounds)
    if formula is None and not loss.is_zero:
        losses, *of_loss = pairs.pair_losses(sums)
        slopes = torch.stack(of_loss, 1)
    return PairTerms(losses, sums, slopes, metrics)


def settings_of(loss: PreferenceLoss, device: torch.device) -> Tensor:
    """[4] fp64 on the device: beta, label_smoothing and the loss's own options."""
    return _on_device((loss.beta, loss.label_smoothing, *loss.options), device)


@lru_cache(maxsize=64)
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """The numbers as fp64.

    The result is cached, as most runs have the same numbers in every step. A new one is copied
    without waiting: a GPU's driver takes so few bytes over at once.
    """
    return torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)


def formula_of(loss: PairLoss) -> Any:
    """The jit function of a loss; None for a loss that isn't in the registry."""
    # The class counts, not only the name: a subclass may have another formula.
    return FORMULAS[loss.name] if type(loss) is LOSSES.get(loss.name) else None
