"""The head's back end, compared with its naive twin at the start of a run."""

from __future__ import annotations

import functools
import logging

import torch
from torch import nn

from dpofast.errors import ConfigError
from dpofast.model.head import head_options
from dpofast.model.parts import causal_lm, shape
from dpofast_kernels.head import HeadTraits, WrongHeadError, probe_head

logger = logging.getLogger(__name__)

# The back end to fall back on, and what chooses it.
REMEDIES = {
    "triton_fused": "set head_backend: triton to use the other one, and ",
    "triton": "set head_backend: torch to do without Triton, and ",
}


def check_head_backend(
    model: nn.Module,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    backend: str = "auto",
) -> None:
    """Compares the back end that will compute the loss with its naive twin, on a small case.

    Args:
        model: policy or reference; it may still be elsewhere.
        device: device that it will run on.
        autocast_dtype: dtype of the forward pass under autocast; None without autocast.
        backend: the head's back end, as in HeadOptions.

    Raises:
        ConfigError: the back end is wrong on this device, fails there, or is none of its.
    """
    try:
        probed_head(device, head_traits(model, autocast_dtype, backend))
    except WrongHeadError as error:
        remedy = REMEDIES.get(error.backend, "")
        raise ConfigError(f"head: {error}; {remedy}please report this.") from error
    except ValueError as error:  # no back end of this device
        raise ConfigError(f"head_backend: {error}") from error


def head_traits(
    model: nn.Module, autocast_dtype: torch.dtype | None, backend: str = "auto"
) -> HeadTraits:
    """What the head's kernels depend on, of a model's head."""
    lm = causal_lm(model)
    options, head = head_options(lm.config), lm.get_output_embeddings()
    vocab_size, hidden_size = shape(head.weight)
    dtype = head.weight.dtype  # quantised layers may compute in another one
    if autocast_dtype is not None and dtype != torch.float64:  # autocast doesn't touch float64
        dtype = autocast_dtype
    return HeadTraits(
        dtype,
        hidden_size,
        vocab_size,
        getattr(head, "bias", None) is not None,
        options.softcap,
        options.logit_scale,
        backend,
    )


@functools.cache
def probed_head(device: torch.device, traits: HeadTraits) -> str:
    """The name of the back end, once it has passed its probe; logged the first time.

    The result is cached: policy and reference, and later trainers of the process, share a probe.
    """
    backend = probe_head(device, traits)
    dtype = str(traits.dtype).removeprefix("torch.")
    logger.info("Head: %s (%s); compared with its naive twin on %s.", backend, dtype, device)
    return backend
