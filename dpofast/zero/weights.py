"""Weights under DeepSpeed before it has made an engine: gathers shards, and sets the precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def spread(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Select the tensors that ZeRO-3 has sharded, whether or not they are gathered right now."""
    return [tensor for tensor in tensors if hasattr(tensor, "ds_status")]


@contextlib.contextmanager
def gathered(tensor: Tensor) -> Iterator[Tensor]:
    """Inside the `with` block, a tensor is whole on this rank, even if ZeRO-3 has sharded it.

    All ranks must enter and leave at the same time.
    """
    with gathering([tensor]):
        yield tensor


def gathering(tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager inside which these tensors are whole on this rank.

    Tensors that aren't sharded, or are gathered already, are left as they are. All ranks must enter
    and leave at the same time.
    """
    parts: list[Any] = spread(tensors)
    if not parts:
        return contextlib.nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    # GatheredParameters raises if an outer `with` block has gathered one of its tensors already.
    absent = [tensor for tensor in parts if tensor.ds_status != ZeroParamStatus.AVAILABLE]
    return GatheredParameters(absent) if absent else contextlib.nullcontext()


def cast_weights(model: nn.Module, config: dict[str, Any]) -> None:
    """Cast weights to the precision in which DeepSpeed will train, before its engine does so.

    The reference is then scored with exactly the weights that training begins with.

    Args:
        model: model to change in place. Weights that ZeRO-3 has sharded have that precision already
            when they are loaded.
        config: DeepSpeed configuration with fp16 and bf16 filled in.
    """
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        if config.get(name, {}).get("enabled") is True:
            for parameter in model.parameters():
                if parameter.is_floating_point() and not hasattr(parameter, "ds_status"):
                    parameter.data = parameter.data.to(dtype)
