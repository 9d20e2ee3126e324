"""Counts what ZeRO-3 gathers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn


@contextlib.contextmanager
def count_gathers(model: nn.Module) -> Iterator[Counter[str]]:
    """Inside, every all-gather of a parameter is counted under its name.

    DeepSpeed gives each partitioned parameter two functions through which alone it is gathered:
    `all_gather_coalesced`, for its hooks around modules and for its prefetching, and `all_gather`
    elsewhere. Both are told which parameters to gather, and pass over those that are there
    already. What is counted is therefore a collective, whenever it runs and is waited for.
    """
    counts: Counter[str] = Counter()
    names = {id(p): name for name, p in model.named_parameters()}

    def counted(parameter: Any, gather: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(params: Iterable[Any] | None = None, *args: Any, **kwargs: Any) -> Any:
            params = [parameter] if params is None else list(params)
            absent = [p for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            counts.update(names[id(p)] for p in absent)
            return gather(params, *args, **kwargs)

        return wrapper

    kept = [(p, p.all_gather_coalesced, p.all_gather) for p in model.parameters()]
    for parameter, coalesced, gather in kept:
        parameter.all_gather_coalesced = counted(parameter, coalesced)
        parameter.all_gather = counted(parameter, gather)
    try:
        yield counts
    finally:
        for parameter, coalesced, gather in kept:
            parameter.all_gather_coalesced, parameter.all_gather = coalesced, gather
