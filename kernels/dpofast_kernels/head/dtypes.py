"""Which dtype the head computes, accumulates and multiplies in."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(hidden_states: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that both inputs are cast to: the autocast dtype under autocast, else their own.

    Autocast leaves float64 alone, as everywhere in PyTorch.

    Raises:
        ValueError: the dtypes differ outside autocast, or one of them is not a floating dtype.
    """
    dtypes = (hidden_states.dtype, weight.dtype)
    device_type = hidden_states.device.type
    if not set(dtypes) <= set(FLOATS):
        raise ValueError(
            f"hidden_states is {dtypes[0]} and weight {dtypes[1]}, expected float64, float32, "
            "bfloat16 or float16."
        )
    if torch.is_autocast_enabled(device_type) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(device_type)
    if dtypes[0] != dtypes[1]:
        raise ValueError(
            f"hidden_states is {dtypes[0]} but weight {dtypes[1]}: cast one of them, or run the "
            "op under torch.autocast."
        )
    return weight.dtype


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, and of gradients that are still being summed, for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which d_logits and scaled hidden states enter a matrix product.

    bf16 stays bf16 where the device can multiply it with an fp32 result. fp16 is always upcast:
    hidden states times a pair's coefficient can fall below its range.
    """
    if weight.dtype == torch.bfloat16 and has_wide_products(weight.device, weight.dtype):
        return torch.bfloat16
    return accumulate_dtype(weight.dtype)


@lru_cache(maxsize=32)
def has_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device can multiply matrices of `dtype` with an fp32 result, and add to one.

    The first call for a device and dtype tries both, and logs a device that can't.

    Raises:
        torch.OutOfMemoryError: there was no memory to try it, so nothing is known yet.
    """
    if device.type != "cuda":
        return False
    small = torch.zeros(16, 16, dtype=dtype, device=device)
    wide = small.float()
    try:
        torch.mm(small, small, out_dtype=torch.float32, out=wide)
        torch.addmm(wide, small, small, out_dtype=torch.float32, out=wide)
    except torch.OutOfMemoryError:  # a RuntimeError, too
        raise
    except RuntimeError as error:  # older PyTorch, and some builds for ROCm
        reason = str(error).partition("\n")[0]
        logger.warning(
            "%s multiplies no %s matrices with an fp32 result (%s): the head's products run in "
            "fp32, which is several times slower.",
            *(device, dtype, reason),
        )
        return False
    logger.info("%s multiplies %s matrices with an fp32 result.", device, dtype)
    return True
