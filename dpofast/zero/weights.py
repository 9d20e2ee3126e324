"""A model's weights under DeepSpeed, as long as no engine runs them: precision, and all parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def gathered(tensor: Tensor) -> Iterator[Tensor]:
    """Inside, all of a tensor is here, also if ZeRO-3 has spread it over the ranks.

    All ranks enter and leave together.
    """
    with _gathering([tensor]):
        yield tensor


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside, all weights of a model are here: each rank may run it as often as it likes.

    All ranks enter and leave together.
    """
    with _gathering(list(model.parameters())):
        yield


@contextlib.contextmanager
def runnable(trainer: Any) -> Iterator[None]:
    """Inside, the model of a transformers Trainer runs, also if DeepSpeed has no engine for it yet.

    All ranks enter and leave together.
    """
    model = trainer.model
    if not trainer.is_deepspeed_enabled or trainer.model_wrapped is not model:
        yield
        return
    with whole(model):
        model.to(trainer.args.device)
        yield


def _gathering(tensors: list[Any]) -> contextlib.AbstractContextManager[Any]:
    spread = [tensor for tensor in tensors if hasattr(tensor, "ds_status")]
    if not spread:
        return contextlib.nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    absent = [tensor for tensor in spread if tensor.ds_status != ZeroParamStatus.AVAILABLE]
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
