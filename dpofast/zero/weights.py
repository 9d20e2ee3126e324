"""Weights under DeepSpeed, as long as no engine runs them: their precision, and all their parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def spread(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of some tensors those that ZeRO-3 has spread over the ranks, gathered or not."""
    return [tensor for tensor in tensors if hasattr(tensor, "ds_status")]


@contextlib.contextmanager
def gathered(tensor: Tensor) -> Iterator[Tensor]:
    """Inside, all of a tensor is here, also if ZeRO-3 has spread it over the ranks.

    All ranks enter and leave together.
    """
    with gathering([tensor]):
        yield tensor


def gathering(tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Inside, all of these tensors are here; all ranks enter and leave together."""
    parts: list[Any] = spread(tensors)
    if not parts:
        return contextlib.nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    absent = [tensor for tensor in parts if tensor.ds_status != ZeroParamStatus.AVAILABLE]
    return GatheredParameters(absent) if absent else contextlib.nullcontext()


def cast_weights(model: nn.Module, config: dict[str, Any]) -> None:
    """Give weights the precision in which DeepSpeed is going to train, as its engine would later.

    The reference is then scored by the very weights that training begins with.

    Args:
        model: changed in place; weights that ZeRO-3 has spread are in that precision already.
        config: DeepSpeed's, with fp16 and bf16 filled in.
    """
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        if config.get(name, {}).get("enabled") is True:
            for parameter in model.parameters():
                if parameter.is_floating_point() and not hasattr(parameter, "ds_status"):
                    parameter.data = parameter.data.to(dtype)
